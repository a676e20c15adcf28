"""What a run is: one frozen tree, filled from a YAML file and dotted overrides.

Knows nothing of torch, Ray or files other than the spec itself. Every section refuses keys it does not have
and names the nearest right one; values derived from others are properties, never stored twice.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError


class UserError(ValueError):
    """Something the user can put right. The message says what, why and what to change."""


class SpecError(UserError):
    """The spec itself is wrong; the message starts with the dotted path."""


class Stopped(Exception):
    """Training left early because it was asked to; `step`: how many are done and in a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped as asked; the same command goes on from step {step}")
        self.step = step

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.step,)


class Section(BaseModel):
    """Base of every section: immutable, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise PydanticCustomError("unknown_key", "{key}", {"key": str(key), "near": _nearest(cls, str(key)), "kinds": _other_kinds(cls, str(key))})
        return values

    def _differs(self, *names: str) -> str:
        """The first of these that is not at its default, which is what a spec that was written out says too; empty when none is."""
        return next((name for name in names if getattr(self, name) != type(self).model_fields[name].default), "")


# --- data ---------------------------------------------------------------------------------------------------------


class _Data(Section):
    task: str = "classification"
    split_seed: int = Field(0, ge=0)
    validation_rows: int = Field(200, ge=1)
    calibration_rows: int = Field(200, ge=1)

    @field_validator("task")
    @classmethod
    def _only_classification(cls, task: str) -> str:
        if task != "classification":
            raise ValueError("not supported yet; the only task is 'classification'")
        return task


class Digits(_Data):
    """scikit-learn's 1,797 images of 8x8, embedded: needs no file."""

    source: Literal["digits"] = "digits"
    test_rows: int = Field(600, ge=1)


class FashionMnist(_Data):
    """The four gzip IDX files of Fashion-MNIST; the 10,000 official test rows are the test split."""

    source: Literal["fashion_mnist"]
    path: str = "/usr/share/datasets/fashion-mnist"
    validation_rows: int = Field(3000, ge=1)
    calibration_rows: int = Field(500, ge=1)


class Npz(_Data):
    """A user's arrays: `x` [rows, ...] and `y` [rows]; optional `labels`, `x_test`, `y_test`."""

    source: Literal["npz"]
    path: str
    test_rows: int = Field(1000, ge=1)


class Text(_Data):
    """Texts with labels, as ids of a tokenizer learnt from the train split alone (byte-level BPE), or of `tokenizer`, the tokenizer.json of a model that is trained on.

    `kind`: `wordnet` is the nouns' glosses by topic, of Debian's wordnet-base; `file` is a user's own .tsv or .jsonl with `text` and
    `label`; `vader` is movieReviewSnippets_GroundTruth.txt of VADER's data, positive or not. Texts are cut at `max_tokens`.
    """

    source: Literal["text"]
    kind: Literal["wordnet", "file", "vader"] = "wordnet"
    path: str = ""
    tokenizer: str = ""
    max_tokens: int = Field(128, ge=2)
    # 256 bytes and the padding are always in it.
    vocabulary: int = Field(8000, ge=300)
    # WordNet's rarest topic has 42 of 82,064 rows: fewer would leave it out of a split.
    validation_rows: int = Field(2000, ge=1)
    calibration_rows: int = Field(2000, ge=1)
    test_rows: int = Field(2000, ge=1)

    @model_validator(mode="after")
    def _has_a_path(self) -> Text:
        if not self.path and self.kind != "wordnet":
            raise ValueError(f".path: kind {self.kind!r} reads a file; say which")
        return self

    @property
    def file(self) -> Path:
        """The file that is read."""
        return Path(self.path or "/usr/share/wordnet/data.noun").expanduser()


class DataFactory(_Data):
    """A user's own torch Dataset: `module:callable`, called with `options`."""

    source: Literal["factory"]
    factory: str
    options: dict[str, Any] = {}
    test_rows: int = Field(1000, ge=1)


Data = Annotated[Digits | FashionMnist | Npz | Text | DataFactory, Field(discriminator="source")]

Positive = Annotated[int, Field(ge=1)]

# --- model --------------------------------------------------------------------------------------------------------


class ConvNet(Section):
    """A residual CNN: a stage a width, of so many blocks; `strides` halve the picture (default: every stage but the first)."""

    name: Literal["convnet"] = "convnet"
    stem: int | None = Field(None, ge=1)
    stem_stride: int = Field(1, ge=1, le=4)
    channels: tuple[Positive, ...] = Field((32, 64), min_length=1)
    blocks: tuple[Positive, ...] = (1, 1)
    strides: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _one_depth_a_width(self) -> ConvNet:
        given = {"blocks": self.blocks, "strides": self.strides or self.blocks}
        for name, values in given.items():
            if len(values) != len(self.channels):
                raise ValueError(f".{name}: {len(values)} values for {len(self.channels)} stages (model.channels); give one a stage")
        return self


class Transformer(Section):
    """A pre-norm encoder over square patches, mean-pooled."""

    name: Literal["transformer"]
    patch: int = Field(4, ge=1)
    dim: int = Field(64, ge=8)
    depth: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Transformer:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class TextTransformer(Section):
    """The same encoder over token ids: embedding, sinusoidal positions, the mean over what is not padding."""

    name: Literal["text_transformer"]
    dim: int = Field(128, ge=8)
    depth: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> TextTransformer:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even, and a multiple of heads {self.heads}")
        return self


class ModelFactory(Section):
    """A user's own `torch.nn.Module`: `module:callable`, called with `options`."""

    name: Literal["factory"]
    factory: str
    options: dict[str, Any] = {}


Model = Annotated[ConvNet | Transformer | TextTransformer | ModelFactory, Field(discriminator="name")]

# --- train --------------------------------------------------------------------------------------------------------


# Means to make a step faster: the optimizer in one kernel; pictures with channels innermost; the training rows on the device, when a quarter of its
# memory holds them; the next batches made in a thread; torch.compile; both passes captured once and replayed, on one GPU.
Speed = Literal["fused", "channels_last", "resident", "prefetch", "compile", "cuda_graphs"]
SPEED: tuple[Speed, ...] = typing.get_args(Speed)
# They change no bit of what is learnt; the others change what a step rounds to.
EXACT: tuple[Speed, ...] = ("resident", "prefetch")


class Ddp(Section):
    """How workers exchange gradients (torch's DistributedDataParallel). `compress: bf16` halves the bytes and rounds what is exchanged.

    `static_graph`: every step uses every parameter in the same order; then each micro-batch is exchanged for itself. `sync_batchnorm`: statistics of the whole batch, on GPUs.
    """

    bucket_mib: float = Field(25, gt=0)
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    compress: Literal["none", "bf16"] = "none"
    sync_batchnorm: bool = False


class Train(Section):
    """One training run. `batch_size` is global: over all workers and all accumulated micro-batches.

    `micro_batch`: rows that one worker computes at once, `auto` the most that fit its memory; with it the accumulation follows from the
    number of workers, which may change between restarts. `tokens_per_batch`: of texts, in place of `batch_size` and `micro_batch`: groups of
    rows of like length, as many as hold this many tokens with their padding, over all workers. `fp32_modules`: names of modules, or prefixes of them, that stay in fp32 whatever `precision` says.
    `precision` and `speed` as `auto` are measured on a few steps, and what pays is kept; `speed: exact` tries only what changes no bit, in runs of 1,000 steps or more.
    `determinism`: `seeded` draws everything random from `seed`; `warn` also takes torch's deterministic operators and notes those that have no
    such form; `strict` ends with the name of the first of them. `profile_steps`: of so many steps, after three, rank 0 leaves a Chrome trace
    beside the step log (`portaisys train SPEC train.profile_steps=5`); it changes nothing that is computed.
    `min_workers`: how few of `num_workers` will do where there is not room for all, 0 for one process without workers; None: all or nothing.
    `hang_timeout_s`: workers none of which moves for so long, once they have read their data, are ended and begin again from the last checkpoint; longer than a step (the
    first with what it compiles), than a checkpoint takes to be written and than 512 rows of validation; 0: never.
    """

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    micro_batch: Positive | Literal["auto"] | None = None
    tokens_per_batch: int | None = Field(None, ge=1)
    accumulate_steps: int = Field(1, ge=1)
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = "fp32"
    fp32_modules: tuple[str, ...] = ()
    speed: tuple[Speed, ...] | Literal["auto", "exact"] = ()
    ddp: Ddp = Ddp()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip_norm: float | None = Field(5.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    augment: Literal["none", "shift", "shift_flip", "shift_flip_erase"] = "none"
    num_workers: int = Field(0, ge=0)
    min_workers: int | None = Field(None, ge=0)
    use_gpu: bool = False
    cpus_per_worker: int = Field(1, ge=1)
    # Labels that a node must have to hold a worker, {role: train} on the clusters of docs/cluster.md; not asked for without workers.
    label_selector: dict[str, str] = {}
    checkpoint_every_steps: int = Field(200, ge=1)
    max_failures: int = Field(2, ge=0)
    hang_timeout_s: float = Field(600.0, ge=0)
    determinism: Literal["seeded", "warn", "strict"] = "seeded"
    profile_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fewer_will_do(self) -> Train:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(f".min_workers: {self.min_workers} are more than num_workers {self.num_workers}; take at most that, or leave it out")
        counts = range(max(1, self.min_workers), self.num_workers + 1)
        odd = [count for count in counts if self.batch_size % (count * self.accumulate_steps)]
        if odd and not (self.micro_batch or self.tokens_per_batch):
            raise ValueError(f".min_workers: batch_size {self.batch_size} is not a multiple of {odd[0]} workers x accumulate_steps, and so many there may be; set micro_batch, with which any number of workers will do")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        parts = max(1, self.num_workers) * self.accumulate_steps
        if self.tokens_per_batch:
            if self.micro_batch or self.accumulate_steps > 1:
                raise ValueError(".tokens_per_batch: it says what is computed at once as well; leave micro_batch and accumulate_steps out")
            if self.ddp.static_graph or self.ddp.sync_batchnorm:
                raise ValueError(".tokens_per_batch: workers cut their rows into different numbers of micro-batches, and would wait for each other for ever with ddp.static_graph or ddp.sync_batchnorm; leave those out")
        elif self.micro_batch:
            if self.accumulate_steps > 1:
                raise ValueError(".accumulate_steps: it follows from micro_batch; leave one of the two out")
            if self.batch_size < parts:
                raise ValueError(f"batch_size {self.batch_size} gives no row to some of {parts} workers; take at least {parts}")
        elif self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_workers x accumulate_steps = {parts}; "
                f"take {self.batch_size // parts * parts or parts} or {(self.batch_size // parts + 1) * parts}, or set micro_batch, with which any number of workers will do"
            )
        return self


# --- compress -----------------------------------------------------------------------------------------------------


class Prune(Section):
    """Structured pruning until at least these fractions of the multiply-accumulates, parameters and latency are gone (0: no target).

    Latency is that of the fp32 file in ONNX Runtime, at batch 1 on one thread. Or, with `ratios`, this fraction of the channels of each
    stage (convnet) or of the neurons of each block (transformer), once: what a search over stages varies.
    `what` may leave: channels of convolutions, `neurons` of linear layers (a transformer's feed-forward), whole attention `heads`, whole
    residual `blocks`. `importance`: `norm` of the weights; `taylor`, weight times gradient on training rows (Molchanov et al. 2019,
    arXiv:1906.10771); `activation`, how much it varies on calibration rows, times the weights that read it (An et al. 2024, arXiv:2312.11983). Of
    blocks: how much the loss on calibration rows grows without one. `scope`: the least important of each `layer`, or of all (`global`). `steps`: as many
    times a little leaves, and importance is asked anew; 1: it is asked once, and as little leaves as will do.
    `round_to`: widths stay multiples of it, 16 bytes where a GPU computes: 8 of fp16, 16 of int8; 8 fp32 numbers are also one vector of AVX2.
    `keep`: names of modules in which nothing changes.
    """

    what: tuple[Literal["channels", "neurons", "heads", "blocks"], ...] = Field(("channels", "neurons"), min_length=1)
    importance: Literal["norm", "taylor", "activation"] = "norm"
    scope: Literal["layer", "global"] = "layer"
    mac_cut: float = Field(0.5, ge=0, lt=1)
    parameter_cut: float = Field(0.0, ge=0, lt=1)
    latency_cut: float = Field(0.0, ge=0, lt=1)
    ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    round_to: int = Field(8, ge=1)
    steps: int = Field(20, ge=1)
    keep: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_target(self) -> Prune:
        if self.ratios is not None and (self.mac_cut, self.parameter_cut, self.latency_cut) != (0.5, 0.0, 0.0):
            raise ValueError(".ratios: they decide what is cut, so mac_cut, parameter_cut and latency_cut cannot be met as well; leave those out")
        if self.ratios is not None and self._differs("scope", "steps"):
            raise ValueError(".ratios: they are of each stage and cut at once; leave scope and steps out, or take mac_cut")
        if self.ratios is not None and "blocks" in self.what:
            raise ValueError(".ratios: they are of widths; leave blocks out of what, or take mac_cut")
        if not any((self.mac_cut, self.parameter_cut, self.latency_cut)):
            raise ValueError(".mac_cut: there is no target; set mac_cut, parameter_cut or latency_cut above 0")
        return self


class Sparsify(Section):
    """Two of every four weights become zero, but of the layers in `keep`; worth it only with TensorRT and engine.sparse, before a distill that trains on with the zeros held."""

    keep: tuple[str, ...] = ()


class Ramp(Section):
    """A weight that is `start` in the first step and `end` in the last; between them on a line, or on half a cosine, which is slow at both ends."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    schedule: Literal["linear", "cosine"] = "linear"


Weight = Annotated[float, Field(ge=0)] | Ramp
# Of the student's modules by name, each with the teacher's of the same name, or of the name given.
Layers = tuple[str, ...] | dict[str, str]


class Features(Section):
    """Hidden states as the teacher has them, through a learnt projection where widths differ. `layers` by default: the stages of a convnet, the layers of a transformer, evenly spaced where the depths differ."""

    weight: Weight = 1.0
    layers: Layers | None = Field(None, min_length=1)


class AttentionMaps(Section):
    """Where the teacher looks: of a transformer the maps averaged over the heads, of a CNN the squares averaged over the channels. `layers` by default: all attentions, or the stages of a convnet."""

    weight: Weight = 1.0
    layers: Layers | None = Field(None, min_length=1)


class Relations(Section):
    """Distances and angles between the rows of a micro-batch (at most 128 of them). `layers` by default: the last stage or layer."""

    weight: Weight = 1.0
    distance: float = Field(1.0, ge=0)
    angle: float = Field(2.0, ge=0)
    layers: Layers | None = Field(None, min_length=1)


class TeacherFactory(Section):
    """A user's own trained `torch.nn.Module`: `module:callable`, called with `options`; it takes the rows as the data has them, not normalised."""

    factory: str
    options: dict[str, Any] = {}


class Distill(Section):
    """Training on against a teacher: alpha * KL at `temperature` + (1 - alpha) * cross entropy, and what of `features`, `attention` and `relations` is there.

    `teacher`: None is the run's dense model; NAME@VERSION or NAME@alias one of the registry, whose fp32 file answers with logits alone; or a factory.
    `student`: None is the model as the steps before left it; else a smaller model by spec, which begins with the teacher's layers where shapes allow.
    A weight is a number, or {start, end, schedule} over the steps.
    """

    epochs: int = Field(10, ge=1)
    learning_rate: float = Field(0.05, gt=0)
    temperature: float = Field(4.0, gt=0)
    alpha: Weight = 0.7
    features: Features | None = None
    attention: AttentionMaps | None = None
    relations: Relations | None = None
    student: Model | None = None
    teacher: str | TeacherFactory | None = None

    @field_validator("alpha")
    @classmethod
    def _is_a_share(cls, alpha: Weight) -> Weight:
        if max((alpha.start, alpha.end) if isinstance(alpha, Ramp) else (alpha,)) > 1:
            raise ValueError("it is a share of the loss, 0 to 1")
        return alpha

    @field_validator("teacher")
    @classmethod
    def _is_a_reference(cls, teacher: str | TeacherFactory | None) -> str | TeacherFactory | None:
        if isinstance(teacher, str) and not all(teacher.partition("@")[::2]):
            raise ValueError("write NAME@VERSION or NAME@alias of the registry, or {factory: module:callable}")
        return teacher

    @property
    def hidden(self) -> dict[str, Features | AttentionMaps | Relations]:
        """The losses that read layers, by kind."""
        given = {"features": self.features, "attention": self.attention, "relations": self.relations}
        return {kind: options for kind, options in given.items() if options}

    @model_validator(mode="after")
    def _teacher_shows_layers(self) -> Distill:
        if self.hidden and isinstance(self.teacher, str):
            raise ValueError(f".{next(iter(self.hidden))}: a teacher from the registry is an ONNX file, which shows its logits and no layers; leave it out, or take the dense model or a factory as teacher")
        return self


class Quantize(Section):
    """INT8 (or fp8) of the exported ONNX, judged like every other candidate.

    `method`: `ptq` calibrates ranges; `qat` first trains on for `epochs` at `learning_rate` with the rounding in every step (`distill`: against the dense model's answers
    as well), in fp32, one process and without train.speed and ema_decay; `weight_only` rounds weights alone, which makes the file small and no engine faster.
    `calibration: auto` tries all three and keeps the one whose int8 answers to validation rows err least. `keep`: layers left in fp32, by name or by a module they
    stand in. `sensitivity`: measure each layer quantized alone. `mixed`: give the layers that err most back to fp32 until, on validation rows, no more than
    `max_drop` of accuracy (a fraction; by default half of gate.max_accuracy_drop) is lost; naming `max_drop` asks for it too. `rows`: of validation, for all of this.
    """

    calibration: Literal["auto", "minmax", "entropy", "percentile"] = "minmax"
    quantize_add: bool | None = None
    # 7-bit weights: without VNNI, x86 adds u8 x s8 products in 16 bits, which full-range weights overflow
    # (docs/log.md, 2026-11-22: error 8.8 % instead of 3.3 %).
    reduce_range: bool = True
    method: Literal["ptq", "qat", "weight_only"] = "ptq"
    epochs: int = Field(2, ge=1)
    learning_rate: float = Field(0.001, gt=0)
    distill: bool = False
    keep: tuple[str, ...] = ()
    sensitivity: bool = False
    mixed: bool = False
    max_drop: float | None = Field(None, ge=0, lt=1)
    rows: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _method_has_what_is_asked(self) -> Quantize:
        if self.method == "weight_only" and (self.sensitivity or self.searches or self._differs("calibration")):
            raise ValueError(".method: weight_only calibrates nothing and has no layers to search; leave sensitivity, mixed, max_drop and calibration out, or take ptq")
        if self.method == "qat" and self._differs("calibration"):
            raise ValueError(".calibration: qat learns the ranges while it trains, so there is nothing to calibrate; leave it out, or take ptq")
        if self.method != "qat" and (idle := self._differs("distill", "epochs", "learning_rate")):
            raise ValueError(f".{idle}: only qat trains, and this is {self.method}; set method: qat, or leave it out")
        return self

    @property
    def searches(self) -> bool:
        return self.mixed or self.max_drop is not None

    @property
    def stage(self) -> dict[str, Any]:
        """Options of the stages that write files; newer ones at their defaults are left out, so that a key stays what it was before they were there."""
        first = ("calibration", "quantize_add", "reduce_range")
        return {name: value for name, value in self.model_dump().items() if name in first or value != type(self).model_fields[name].default}

    @property
    def training(self) -> dict[str, Any]:
        """Of these what the training of qat depends on."""
        return {name: value for name, value in self.model_dump().items() if name in ("method", "quantize_add", "reduce_range", "epochs", "learning_rate", "distill", "keep")}


class Step(Section):
    """One compression step: exactly one of its keys."""

    prune: Prune | None = None
    sparsify: Sparsify | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Step:
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a step holds exactly one of prune, sparsify, distill, quantize (an empty one is written 'quantize: {{}}'); this has {given or 'none'}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)

    @property
    def options(self) -> Prune | Sparsify | Distill | Quantize:
        return typing.cast("Prune | Sparsify | Distill | Quantize", getattr(self, self.kind))


# Told apart by a function: errors then speak of the one that was meant.
Compress = Annotated[
    Annotated[tuple[Step, ...], Tag("steps")] | Annotated[Literal["auto"], Tag("auto")], Discriminator(lambda given: "auto" if isinstance(given, str) else "steps")
]


# --- export, engine, gate, search, serve, storage -----------------------------------------------------------------


class Export(Section):
    """ONNX file and the batch sizes it is verified at: 1, 2, opt, max and one random size."""

    opset: int = Field(20, ge=18)
    opt_batch: int = Field(8, ge=1)
    max_batch: int = Field(64, ge=2)
    golden_rows: int = Field(64, ge=2)
    tolerance: float = Field(1e-4, gt=0)

    @model_validator(mode="after")
    def _opt_below_max(self) -> Export:
        if self.opt_batch > self.max_batch:
            raise ValueError(f"opt_batch {self.opt_batch} exceeds max_batch {self.max_batch}")
        return self


Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
BACKEND_PRECISIONS: dict[str, tuple[str, ...]] = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "tensorrt": ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")}


class Engine(Section):
    """`backend` is measured, gated and served; `also_build` are built, and run where the device is there, each in those of the `precisions` it has.
    `torch` among them has the dense model timed through torch.compile beside the eager one, as a reference: it is never served.

    `auto` times what this machine can run and takes the best by `objective`: the least latency at batch 1, or the most
    rows a second whose p99 is within `p99_limit_ms`.
    """

    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    objective: Literal["latency", "throughput"] = "latency"
    p99_limit_ms: float | None = Field(None, gt=0)
    also_build: tuple[Literal["onnxruntime", "openvino", "tensorrt", "torch"], ...] = ()
    precisions: tuple[Precision, ...] | None = None
    threads: int = Field(1, ge=1)
    # ONNX Runtime's: auto is CUDA where onnxruntime-gpu and a GPU are, else the CPU.
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    # `slots`: batches in flight on one engine. TensorRT's: `sparse`: use 2:4 zeros where weights have them; `workspace_mib`: scratch memory a build may plan with.
    slots: int = Field(1, ge=1, le=8)
    cuda_graphs: bool = True
    workspace_mib: int | None = Field(None, ge=1)
    optimization_level: int = Field(3, ge=0, le=5)
    sparse: bool = False

    @field_validator("backend", mode="before")
    @classmethod
    def _torch_is_no_engine(cls, backend: Any) -> Any:
        if backend == "torch":
            raise ValueError("is the offline reference and is not served; write also_build: [torch] to have it timed beside the engines")
        return backend

    @model_validator(mode="after")
    def _backend_has_precision(self) -> Engine:
        if self.p99_limit_ms is not None and (self.backend, self.objective) != ("auto", "throughput"):
            raise ValueError(".p99_limit_ms: only a choice by throughput heeds it; set engine.backend=auto and engine.objective=throughput, or leave it out")
        backends = [*BACKEND_PRECISIONS] if self.backend == "auto" else [name for name in (self.backend, *self.also_build) if name != "torch"]
        known = dict.fromkeys(precision for backend in backends for precision in BACKEND_PRECISIONS[backend])
        for precision in self.precisions or ():
            if precision not in known:
                raise ValueError(f".precisions: {precision!r} is not one of {', '.join(known)}, which {' or '.join(backends)} has")
        return self


class Gate(Section):
    """How much accuracy may be lost (a fraction: 0.005 is half a point) and how sure we must be.

    `max_class_recall_drop`: how much recall any one class may lose, a fraction of its own rows; None: recall is reported and not gated.
    """

    max_accuracy_drop: float = Field(0.005, gt=0, lt=1)
    max_class_recall_drop: float | None = Field(None, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    latency_pairs: int = Field(300, ge=20)


OBJECTIVES = {"validation_error": "min", "validation_accuracy": "max", "latency_ms": "min", "parameters": "min", "macs": "min", "size_bytes": "min"}
GOALS = {"latency": "latency_ms", "size": "size_bytes", "macs": "macs"}


class EarlyStop(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) on validation error: after `grace_epochs`, one in `reduction` goes on."""

    grace_epochs: int = Field(1, ge=1)
    reduction: int = Field(3, ge=2)


class Search(Section):
    """Hyperparameter search. Read by `tune`, whose search space is a file of tune_spaces/, and by `run` of `compress: auto`, which has a space of its own.

    `goal`: what `compress: auto` makes least, within gate.max_accuracy_drop.
    """

    trials: int = Field(20, ge=1)
    goal: Literal["latency", "size", "macs"] = "latency"
    max_concurrent: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    objectives: dict[str, Literal["min", "max"]] = {"validation_error": "min", "latency_ms": "min", "parameters": "min"}
    early_stop: EarlyStop | None = None
    latency_rounds: int = Field(100, ge=20)

    @field_validator("objectives")
    @classmethod
    def _objectives_agree(cls, objectives: dict[str, str]) -> dict[str, str]:
        for name, direction in objectives.items():
            if name not in OBJECTIVES:
                raise ValueError(f"{name!r} is not one of {', '.join(OBJECTIVES)}")
            if direction != OBJECTIVES[name]:
                raise ValueError(f"{name}: {direction} contradicts what a model is for; write {name}: {OBJECTIVES[name]}")
        if {"validation_error", "validation_accuracy"} <= objectives.keys():
            raise ValueError("validation_error and validation_accuracy are the same objective with opposite signs; keep one")
        if not objectives:
            raise ValueError(f"at least one of {', '.join(OBJECTIVES)} is needed")
        return objectives


class Serve(Section):
    """How a published version is served. `max_batch`: None is what the version was verified up to."""

    port: int = Field(8000, ge=1, le=65535)
    max_batch: int | None = Field(None, ge=1)
    max_delay_ms: float = Field(0.0, ge=0)
    max_queue: int = Field(1024, ge=1)
    num_replicas: int = Field(1, ge=1)


class Storage(Section):
    """Where stages leave their artifacts: a local folder, a mount shared by all nodes, or s3://bucket/prefix."""

    path: str = "runs"
    shared: bool = False
    cache: str = "~/.cache/portaisys"
    # Of built engines on this machine; beyond it those go that were used longest ago.
    max_cache_gib: float = Field(20.0, gt=0)
    # s3://bucket/prefix where machines of one kind share the engines they build, behind the cache of each. A folder they all see is named in `cache`.
    shared_cache: str = Field("", pattern="^$|^s3://.+")

    @property
    def remote(self) -> bool:
        return "://" in self.path

    @property
    def cache_dir(self) -> Path:
        return Path(self.cache).expanduser().resolve()

    @property
    def max_cache_bytes(self) -> int:
        return int(self.max_cache_gib * 2**30)


class Spec(Section):
    """The whole run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    seed: int = Field(0, ge=0)
    data: Data = Digits()
    model: Model = ConvNet()
    train: Train = Train()
    # `auto`: recipes are tried on the validation split and the chosen one is written down (recipes.py).
    compress: Compress = ()
    export: Export = Export()
    engine: Engine = Engine()
    gate: Gate = Gate()
    search: Search = Search()
    serve: Serve = Serve()
    storage: Storage = Storage()

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, tree: Any) -> Any:
        """`data` and `model` without their kind mean the defaults: digits and convnet."""
        if not isinstance(tree, Mapping):
            return tree
        kinds = {"data": ("source", "digits"), "model": ("name", "convnet")}
        filled = {name: {key: kind, **tree[name]} for name, (key, kind) in kinds.items() if isinstance(tree.get(name), Mapping)}
        return {**tree, **filled}

    @model_validator(mode="after")
    def _sections_agree(self) -> Spec:
        kinds = [step.kind for step in self.steps]
        if "quantize" in kinds[:-1]:
            raise ValueError(".compress: quantize works on the exported file, so it must be the last step, and stand once")
        if self.serve.max_batch and self.serve.max_batch > self.export.max_batch:
            raise ValueError(f".serve.max_batch: {self.serve.max_batch} exceeds export.max_batch {self.export.max_batch}, up to which engines are verified")
        for precision in {"int8", "fp8"} & {*(self.engine.precisions or ())}:
            if "quantize" not in kinds and self.compress != "auto":
                raise ValueError(f".engine.precisions: {precision!r} needs a quantize step; add '- quantize: {{}}' to compress")
        if self.quantize and self.engine.precisions and not {"int8", "fp8"} & {*self.engine.precisions}:
            raise ValueError(f".engine.precisions: {', '.join(self.engine.precisions)} leave the quantize step without an engine, so it would be dropped; add int8, or remove the step")
        if self.quantize and self.quantize.method == "weight_only" and "fp8" in (self.engine.precisions or ()):
            raise ValueError(".engine.precisions: 'fp8' has no weight_only form; leave it out, or set compress.quantize.method to ptq or qat")
        return self

    @model_validator(mode="after")
    def _no_step_undoes_another(self) -> Spec:
        for number, step in enumerate(self.steps):
            if step.prune and any(before.sparsify for before in self.steps[:number]):
                raise ValueError(f".compress.{number}.prune: two of four weights are zero by then, and what leaves would break the fours up; put sparsify after it")
            if number and isinstance(step, Step) and step.distill and step.distill.student:
                raise ValueError(f".compress.{number}.distill.student: it is another model, so what the steps before it made would be lost; put this step first")
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """The compression steps; none while `auto` has not been resolved."""
        return () if self.compress == "auto" else self.compress

    @property
    def quantize(self) -> Quantize | None:
        return self.steps[-1].quantize if self.steps else None

    @property
    def dims(self) -> tuple[tuple[str, int, int, int], ...]:
        """Free dimensions of the engine's input beside the batch, each with its least, usual and largest size: of texts, their tokens."""
        if not isinstance(self.data, Text):
            return ()
        return (("tokens", 1, max(1, self.data.max_tokens // 4), self.data.max_tokens),)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions an engine is built for, fp32 first."""
        return self.engine.precisions or (("fp32", "int8") if self.quantize else ("fp32",))

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named top-level sections, as a hex string."""
        return digest({name: self.model_dump(mode="json")[name] for name in sections})


def model_of(tree: Mapping[str, Any]) -> Model:
    """A model section out of the plain values that its `model_dump` gave."""
    return TypeAdapter(Model).validate_python(tree)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- the one door -------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Raises SpecError naming the dotted path, the reason and the fix.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such spec file") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: a spec is a mapping of sections, this is {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Spec:
    """Validate a plain tree (as `dump` returns it). Raises SpecError."""
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("\n".join(_explain(item) for item in error.errors())) from None


def dump(spec: Spec) -> dict[str, Any]:
    """The resolved tree as plain YAML-able values; `parse(dump(spec)) == spec`."""
    return spec.model_dump(mode="json")


def to_yaml(spec: Spec) -> str:
    """The resolved tree as YAML, in the order of the sections; of a compression step the one key that it holds."""
    tree = dump(spec)
    if spec.steps:
        tree["compress"] = [{kind: options for kind, options in step.items() if options is not None} for step in tree["compress"]]
    return yaml.safe_dump(tree, sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError(f"override {override!r}: write it as section.key=value, for example train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"override {override!r}: {text!r} is not a YAML value; lists are written [1, 2]") from None
    put(tree, path, value)


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `section.key` or `section.0.key` of a plain tree in place. Raises SpecError where nothing can stand."""
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = _child(node, part, path)
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, path: str) -> Any:
    child = node[_index(node, part, path)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, (dict, list)):
        raise SpecError(f"override {path}: {part!r} holds the value {child!r}, so nothing can stand below it")
    return child


def _index(node: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise SpecError(f"override {path}: {part!r} is not an index of a list of {len(node)}")
    return int(part)


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in _without_tags(item["loc"]))
    if item["type"] == "unknown_key":
        key, near, kinds = (item["ctx"][name] for name in ("key", "near", "kinds"))
        full = f"{path}.{key}" if path else key
        if kinds:
            return f"{full}: {kinds}; leave it out, or take another"
        return f"{full}: unknown key{f'; did you mean {near!r}?' if near and near != full else ''}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if message.startswith("."):  # a section's validator speaks of one of its own keys; the whole spec's of a section
        return f"{path}{message}".lstrip(".")
    given = "" if isinstance(item["input"], (dict, list, tuple)) else f": {item['input']!r}"
    return f"{path or 'spec'}{given}: {message[0].lower()}{message[1:]}"


def _without_tags(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Drop the tags pydantic puts after a discriminated section ('data', 'npz', 'path') and the branches of a union ('alpha', 'Ramp', 'end')."""
    tagged = {number + 1 for number, part in enumerate(loc[:-1]) if part in ("data", "model", "student", "compress") and loc[number + 1] in _TAGS}
    return tuple(part for number, part in enumerate(loc) if number not in tagged and not (number and part in _BRANCHES))


_TAGS = {"steps", "auto", "digits", "fashion_mnist", "npz", "text", "factory", "convnet", "transformer", "text_transformer"}
_BRANCHES = {"Ramp", "TeacherFactory", "constrained-float", "str", "tuple[str, ...]", "dict[str,str]"}


def _nearest(section: type[Section], key: str) -> str:
    here = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
    if here:
        return here[0]
    paths = list(_paths(Spec))
    leaf = [path for path in paths if path.rsplit(".", 1)[-1] == key]
    return (leaf or difflib.get_close_matches(key, paths, n=1, cutoff=0.8) or [""])[0]


def _other_kinds(section: type[Section], key: str) -> str:
    """Of a section that comes in kinds (`data`, `model`): which have a key that this one lacks, in words; empty when none has."""
    for union in (Data, Model):
        members, told_by = typing.get_args(union)
        sections = _sections_of(members)
        names = {kind: typing.get_args(kind.model_fields[told_by.discriminator].annotation)[0] for kind in sections}
        having = [names[kind] for kind in sections if key in kind.model_fields]
        if section in sections and having:
            *first, last = having
            others = f"{', '.join(first)} and {last} have" if first else f"{last} has"
            return f"{told_by.discriminator} {names[section]!r} has no such key; {others}"
    return ""


def _paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_of(field.annotation):
            yield from _paths(inner, f"{prefix}{name}.")


def _sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(annotation) for found in _sections_of(part)]
    return []


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of a plain tree; a list is a value."""
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    return {inner: value for key, child in tree.items() for inner, value in leaves(child, f"{path}.{key}" if path else key).items()}


def changes(before: Any, now: Any) -> dict[str, str]:
    """Dotted path -> what is different there, in words, of two plain trees."""
    old, new = leaves(before), leaves(now)
    return {path: f"{path} was {old.get(path)!r} and is {new.get(path)!r}" for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)}


def json_schema() -> str:
    """The spec's JSON schema, for editors."""
    return json.dumps(Spec.model_json_schema(), indent=1, sort_keys=True) + "\n"
