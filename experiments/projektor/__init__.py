"""Performance of mixtures predicted from small pilots and transport distances: see README.md."""
