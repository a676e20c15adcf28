"""A trained model -> one ONNX file that takes raw rows, and golden inputs and outputs to hold any engine against.

The file is compared with torch at batch 1, 2, opt, max and a random size before it counts as exported: exporters
have been wrong silently (pytorch #166797). Knows nothing of accuracy or engines other than the reference one.
"""

from __future__ import annotations

import ast
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from portaisys import artifact, evaluate
from portaisys.engine import Options, backend
from portaisys.engine.onnx_file import LAYER
from portaisys.models import predictor
from portaisys.spec import Export, UserError

INPUT, OUTPUT, TOKENS = "x", "logits", "tokens"
SCOPES = "pkg.torch.onnx.name_scopes"  # the modules around an operator, outermost first, and the operator's own name


def export(model: nn.Module, rows: NDArray[Any], options: Export, path: Path, *, seed: int = 0, most_tokens: int = 0) -> dict[str, Any]:
    """Write `path` (ONNX) and `golden.npz` beside it (x, logits: what torch answers to `rows`). Returns the parity scores.

    `rows`: [>= 2, ...] of the data; `most_tokens`: of rows that are token ids [n, T], what T is free up to. Raises UserError when the batch is not free or the answers differ from torch's.
    """
    _write(model.eval(), rows[:2], options, path, most_tokens)
    golden = rows[: options.golden_rows]
    answers = evaluate.predict_rows(predictor(model), golden, len(golden))
    np.savez(path.with_name("golden.npz"), x=golden, logits=answers)
    return verify(path, model, rows, options, seed)


def _write(model: nn.Module, sample: NDArray[Any], options: Export, path: Path, most_tokens: int) -> None:
    free = {0: torch.export.Dim("batch", min=1, max=max(options.max_batch, 2))}
    if most_tokens:
        free[1] = torch.export.Dim(TOKENS, min=1, max=most_tokens)
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what matters is checked in `verify`.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model, (torch.from_numpy(sample),), dynamo=True, opset_version=options.opset, external_data=False, verbose=False,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=(free,),
            )  # fmt: skip
        except Exception as error:
            raise UserError(f"export: torch.onnx cannot export this model: {str(error).strip().splitlines()[0]}") from error
    assert program is not None
    proto = _plain(program.model_proto)
    first, *others = proto.graph.input[0].type.tensor_type.shape.dim
    if most_tokens and not others[0].dim_param:
        raise UserError(f"export: the number of tokens was fixed at {others[0].dim_value}; forward must not turn x.shape[1] into a number")
    if not first.dim_param:
        raise UserError(f"export: the batch size was fixed at {first.dim_value}; forward must not turn x.shape[0] into a number (use x.flatten(1), x.shape[0] only in reshape)")
    buffer = io.BytesIO()
    onnx.save(proto, buffer)
    artifact.write_bytes(path, buffer.getvalue())


def _plain(proto: Any) -> Any:
    """Without stack traces of the exporting machine: the same weights must give the same bytes anywhere. What stays is each node's module."""
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        layer = next(iter(ast.literal_eval(scopes)[-2:-1]), "")
        del node.metadata_props[:]
        if layer:
            node.metadata_props.add(key=LAYER, value=layer)
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    return proto


def verify(path: Path, model: nn.Module, rows: NDArray[Any], options: Export, seed: int = 0) -> dict[str, Any]:
    """Largest difference from torch at each batch size. Raises UserError beyond `export.tolerance`."""
    runtime = backend("onnxruntime")
    engine = runtime.load(path, Options(opt_batch=options.opt_batch, max_batch=options.max_batch))
    rng = np.random.default_rng(seed)
    sizes = sorted({1, 2, options.opt_batch, options.max_batch, int(rng.integers(1, options.max_batch + 1))})
    scores: dict[str, Any] = {}
    for size in sizes:
        x = np.ascontiguousarray(_unpadded(rows[rng.integers(0, len(rows), size)]))
        parity = evaluate.parity(predictor(model)(x), engine.run({INPUT: x})[OUTPUT])
        if not parity.finite or parity.max_abs > options.tolerance:
            raise UserError(f"export: at batch {size} the ONNX file differs from torch by {parity.max_abs:.3g} (export.tolerance {options.tolerance:g}); the exporter got an operator wrong")
        scores[f"max_abs_batch_{size}"] = parity.max_abs
    engine.close()
    return scores


def _unpadded(rows: NDArray[Any]) -> NDArray[Any]:
    """Token ids cut to the longest of these rows, so that several lengths are verified; other rows as they are."""
    return rows[:, : int((rows != 0).sum(1).max())] if rows.dtype.kind == "i" else rows
