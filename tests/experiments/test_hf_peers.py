"""The same logits from Hugging Face's own models: `pip install -e '.[peers]'` (it brings torch)."""

import jax
import numpy as np
import pytest

from experiments.models import gpt2, hf, llama, lm
from tests.experiments.test_hf import MODELS, fresh, read

pytestmark = pytest.mark.peers
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.random.default_rng(2).integers(0, 40, (3, 12)).astype(np.int32)


def gpt2_of_theirs():
  config = transformers.GPT2Config(
    vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=4, n_inner=None
  )
  ours = gpt2.GPT2Config(vocab_size=40, max_len=12, n_layer=2, n_head=4, n_embd=16)
  return transformers.GPT2LMHeadModel(config), ours


def llama_of_theirs(kv_heads):
  config = transformers.LlamaConfig(
    vocab_size=40, max_position_embeddings=12, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads, rms_norm_eps=1e-4,
    rope_theta=300.0,
  )  # fmt: skip
  ours = llama.LlamaConfig(
    vocab_size=40, max_len=12, n_layer=2, n_head=4, n_embd=16, d_ff=24, n_kv_head=kv_heads,
    norm_eps=1e-4, rope_theta=300.0,
  )  # fmt: skip
  return transformers.LlamaForCausalLM(config), ours


PEERS = {
  'gpt2': gpt2_of_theirs,
  'llama': lambda: llama_of_theirs(4),
  'grouped': lambda: llama_of_theirs(2),
}


def logits_of(peer):
  with torch.no_grad():
    return peer.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def assert_close(a, b):
  assert np.std(b) > 0.3
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize('max_shard_size', ['1GB', '10KB'])
@pytest.mark.parametrize('peer', PEERS.values(), ids=PEERS)
def test_their_model_here(tmp_path, peer, max_shard_size):
  torch.manual_seed(0)
  theirs, model = peer()
  with torch.no_grad():
    for parameter in theirs.parameters():  # away from norms of 1 and biases of 0
      parameter.add_(0.3 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
  assert (tmp_path / 'model.safetensors').is_file() == (max_shard_size == '1GB')
  params = read(tmp_path, model)
  assert_close(
    np.asarray(jax.jit(lm.apply, static_argnums=2)(params, TOKENS, model)), logits_of(theirs)
  )


@pytest.mark.parametrize('shard_bytes', [hf.SHARD_BYTES, 10_000])
@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_our_model_there(tmp_path, model, shard_bytes):
  params = fresh(model)
  hf.save(tmp_path / 'out', params, model, eot_id=39, shard_bytes=shard_bytes)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  assert theirs.dtype == torch.float32
  ours = np.asarray(jax.jit(lm.apply, static_argnums=2)(params, TOKENS, model))
  assert_close(logits_of(theirs), ours)


def test_our_tokenizer_there(tmp_path):
  from experiments.data.tokenizers import load_tokenizer

  texts = ['the weight of a loss is one number', 'on every device läuft 数据']
  tokenizer = load_tokenizer('bpe:300', lambda: texts)
  tokenizer.save(tmp_path)
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
  for text in texts:
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
