"""The verbs of `portaisys`: thin, one function each. Errors the user can put right are one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from portaisys import spec
from portaisys.screen import (
    Screen,
    answered_table,
    audit_table,
    closing_table,
    compiled_table,
    console,
    converted_table,
    entries_table,
    ledger_table,
    rehearsal_table,
    search_table,
    stage_table,
    timings_table,
    versions_table,
)
from portaisys.spec import Stopped, Storage, UserError

_EXAMPLES = """examples:
  portaisys run jobs/specs/digits.yaml train.epochs=5
  portaisys spec jobs/specs/fashion_mnist.yaml
  portaisys versions digits
  portaisys serve digits@production --port 8000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int | None = options.verb(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 143
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="portaisys", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="verb")
    _verb(verbs, run, "run every stage of a spec that is not finished, gate, publish", "portaisys run jobs/specs/digits.yaml", _spec_arguments, _promote_argument, _resume_argument)
    _verb(verbs, train, "the training stage of a spec alone", "portaisys train jobs/specs/digits.yaml train.epochs=5\n  portaisys train jobs/specs/digits.yaml train.num_workers=16 --dry-run", _spec_arguments, _resume_argument, _dry_argument)
    _verb(verbs, compile_, "make engines of any ONNX file: verify, quantize, time, publish", "portaisys compile model.onnx --calibration data.npz --precision int8", _compile_arguments, _promote_argument, _storage_arguments, name="compile")
    _verb(verbs, benchmark, "time a version: every backend, precision and batch that runs here", "portaisys benchmark digits@production --batches 1,8,32", _version_argument, _benchmark_arguments, _storage_arguments)
    _verb(verbs, predict, "answer the rows of an .npz with a version", "portaisys predict digits@production data.npz --out answers.npz", _version_argument, _predict_arguments, _storage_arguments)
    _verb(verbs, convert, "make a TensorFlow SavedModel of a version, or a .tflite of a finished run", "portaisys convert digits@1 --to savedmodel --out digits-tf\n  portaisys convert jobs/specs/digits.yaml --to tflite --out digits.tflite", _convert_arguments)
    _verb(verbs, tune, "search a space: trials, Pareto front, best spec", "portaisys tune tune_spaces/prune_digits.yaml search.trials=8", _space_arguments)
    _verb(verbs, demo, "run a spec, then serve it and ask it real requests", "portaisys demo jobs/specs/digits.yaml", _spec_arguments, _resume_argument)
    _verb(verbs, show_spec, "print the resolved spec, or its JSON schema", "portaisys spec jobs/specs/digits.yaml train.epochs=3", _optional_spec_arguments, name="spec")
    _verb(verbs, versions, "list the versions of a name", "portaisys versions digits", _name_argument, _storage_arguments)
    _verb(verbs, audit, "judge a version again: its engines on the test rows it was judged on, the same gate", "portaisys audit digits@production", _version_argument, _audit_arguments, _storage_arguments)
    _verb(verbs, promote, "put a version with a passing verdict in production", "portaisys promote digits@2", _version_argument, _because_arguments, _storage_arguments)
    _verb(verbs, rollback, "put back the version that was in production before", "portaisys rollback digits", _name_argument, _because_arguments, _storage_arguments)
    _verb(verbs, traffic, "a canary that answers a share of the requests, a shadow whose answers are compared", "portaisys traffic digits --canary 3 --percent 10 --shadow 4", _name_argument, _traffic_arguments, _because_arguments, _storage_arguments)
    _verb(verbs, ledger, "show and check the append-only ledger", "portaisys ledger", _storage_arguments)
    _verb(verbs, serve, "serve a version over HTTP with Ray Serve", "portaisys serve digits@production", _version_argument, _serve_arguments, _storage_arguments)
    _verb(verbs, key, "make an API key for a server; only its hash is kept", "portaisys key team-a --file keys.yaml --model digits", _name_argument, _key_arguments)
    _verb(verbs, cache, "list, check or shrink the cache of built engines", "portaisys cache prune --max-gib 5", _cache_arguments)
    _verb(verbs, deploy, "check a Serve config strictly, deploy it, wait until it runs", "portaisys deploy serve_apps/digits.yaml", _deploy_arguments)
    return parser


def _verb(verbs: Any, function: Callable[[argparse.Namespace], int | None], text: str, example: str, *add: Callable[[Any], None], name: str = "") -> None:
    parser = verbs.add_parser(
        name or function.__name__, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for arguments in add:
        arguments(parser)
    parser.set_defaults(verb=function)


def _spec_arguments(parser: Any) -> None:
    parser.add_argument("file", help="a spec, for example jobs/specs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.epochs=3")


def _optional_spec_arguments(parser: Any) -> None:
    parser.add_argument("file", nargs="?", help="a spec, for example jobs/specs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.epochs=3")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of every spec, for editors")


def _space_arguments(parser: Any) -> None:
    parser.add_argument("file", help="a search space, for example tune_spaces/prune_digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of its spec, for example search.trials=8")


def _promote_argument(parser: Any) -> None:
    parser.add_argument("--no-promote", action="store_true", help="publish as candidate only")


def _resume_argument(parser: Any) -> None:
    parser.add_argument("--resume", action="store_true", help="go on under a name that another spec has used; what still holds is reused")


def _dry_argument(parser: Any) -> None:
    parser.add_argument("--dry-run", action="store_true", help="train nothing: check the spec against data and model, say steps, shares, shapes and memory of a worker")


def _name_argument(parser: Any) -> None:
    parser.add_argument("name", help="the name of a run, for example digits")


def _version_argument(parser: Any) -> None:
    parser.add_argument("reference", metavar="NAME@VERSION", help="a version or an alias, for example digits@2 or digits@candidate")


def _audit_arguments(parser: Any) -> None:
    parser.add_argument("--data", default="", metavar="PATH", help="where the data lies now (default: data.path of the version's spec); it is held against the digest of the test split")


def _because_arguments(parser: Any) -> None:
    parser.add_argument("--because", default="", help="a reason for the ledger")


def _traffic_arguments(parser: Any) -> None:
    parser.add_argument("--canary", type=_positive, help="a version that answers --percent of the requests that name none")
    parser.add_argument("--percent", type=float, default=10.0, help="of the canary (default: %(default)s)")
    parser.add_argument("--by", default="", metavar="HEADER", help="decide by the value of this header, so that one value stays on one side")
    parser.add_argument("--shadow", type=_positive, help="a version that is asked too; its answers are compared, never returned")
    parser.add_argument("--shadow-percent", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--pin", default="", metavar="PRECISION", help="this precision answers, whatever the precision ladder's signals say")
    parser.add_argument("--clear", action="store_true", help="no canary, no shadow and no pin any more; with neither option, what is set is shown")


def _storage_arguments(parser: Any) -> None:
    parser.add_argument("--storage", default=Storage().path, help="storage.path of the runs (default: %(default)s)")


def _serve_arguments(parser: Any) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for flag, default in (("port", 8000), ("replicas", 1), ("threads", 1), ("max-queue", 1024)):
        parser.add_argument(f"--{flag}", type=_positive, default=default, help="default: %(default)s")
    parser.add_argument("--max-batch", type=_positive, help="default: what the version was verified up to")


def _key_arguments(parser: Any) -> None:
    parser.add_argument("--file", type=Path, required=True, help="where the server reads hashes of keys (its argument `keys`); made if need be")
    parser.add_argument("--model", action="append", help="a model it may ask; may be repeated (default: all)")
    parser.add_argument("--admin", action="store_true", help="it may load, unload and list models too")


def _cache_arguments(parser: Any) -> None:
    parser.add_argument("action", choices=("list", "verify", "prune"), help="verify hashes every byte and removes what is not what its builder wrote")
    parser.add_argument("--cache", default=Storage().cache, help="storage.cache (default: %(default)s)")
    parser.add_argument("--max-gib", type=float, default=Storage().max_cache_gib, help="prune: what may stay (default: %(default)s)")


def _compile_arguments(parser: Any) -> None:
    parser.add_argument("onnx", type=Path, help="an ONNX file of opset 11 or later")
    parser.add_argument("--name", default="", help="what to publish it as (default: the file's name)")
    parser.add_argument("--calibration", type=Path, help="an .npz of real rows, an array an input, and labels `y` where there are any")
    parser.add_argument("--precision", action="append", choices=sorted({name for names in spec.BACKEND_PRECISIONS.values() for name in names}), help="beside fp32; may be repeated")
    parser.add_argument("--backend", default="auto", choices=("auto", *spec.BACKEND_PRECISIONS), help="default: all that run here, the fastest is served")
    parser.add_argument("--objective", default="latency", choices=("latency", "throughput"), help="default: %(default)s")
    parser.add_argument("--dim", action="append", type=_dim, default=[], metavar="NAME=LEAST:USUAL:MOST", help="sizes of a free dimension beside the batch; may be repeated")
    parser.add_argument("--opt-batch", type=_positive, default=8, help="the usual batch (default: %(default)s)")
    parser.add_argument("--max-batch", type=_positive, help="default: 32, or what the file fixes")
    parser.add_argument("--max-error", type=float, default=0.05, help="relative, of a reduced precision without labels (default: %(default)s)")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.01, help="of a reduced precision with labels (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=1, help="default: %(default)s")


def _benchmark_arguments(parser: Any) -> None:
    parser.add_argument("--batches", type=_sizes, default=[], metavar="1,8,32", help="default: 1, the usual and the largest of the version")
    parser.add_argument("--rounds", type=_positive, default=50, help="interleaved rounds a batch (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=1, help="default: %(default)s")


def _predict_arguments(parser: Any) -> None:
    parser.add_argument("data", type=Path, help="an .npz, an array an input, rows in dimension 0")
    parser.add_argument("--out", type=Path, default=Path("answers.npz"), help="default: %(default)s")
    parser.add_argument("--threads", type=_positive, default=1, help="default: %(default)s")


def _convert_arguments(parser: Any) -> None:
    parser.add_argument("source", metavar="NAME@VERSION|SPEC", help="savedmodel: a version, whose fp32 file is converted; tflite: the spec of a finished run, whose smallest model is")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="tflite: what the run was given")
    parser.add_argument("--to", required=True, choices=("savedmodel", "tflite"), help="savedmodel: a folder, batch as free as the version's; tflite: a file of batch 1")
    parser.add_argument("--out", required=True, type=Path, help="what to write; replaced whole, or left as it was")
    parser.add_argument("--storage", help=f"savedmodel: storage.path of the runs (default: {Storage().path})")


def _dim(text: str) -> tuple[str, int, int, int]:
    name, _, sizes = text.rpartition("=")
    parts = sizes.split(":")
    if not name or len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LEAST:USUAL:MOST, for example seq=1:64:256")
    return name, int(parts[0]), int(parts[1]), int(parts[2])


def _sizes(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _deploy_arguments(parser: Any) -> None:
    parser.add_argument("file", help="a Serve config, for example serve_apps/digits.yaml")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of the Ray dashboard (default: %(default)s)")
    parser.add_argument("--timeout-s", type=_positive, default=600, help="how long it may take until all run (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 65535")
    return int(text)


# --- the verbs --------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    from portaisys import launch

    resolved = _settled(spec.load(options.file, options.overrides))
    with Screen() as tell:
        if resolved.compress == "auto":
            from portaisys import recipes  # which imports Ray

            resolved = recipes.resolved(resolved, tell)
        outcome = launch.run(resolved, tell, promote=not options.no_promote, resume=options.resume)
    closing_table(outcome)


def train(options: argparse.Namespace) -> None:
    from portaisys import launch

    resolved = _settled(spec.load(options.file, options.overrides))
    if options.dry_run:
        from portaisys.rehearsal import rehearse

        rehearsal_table(rehearse(resolved))
        return
    with Screen() as tell:
        made = launch.train(resolved, tell, resume=options.resume)
    stage_table(made, launch.left_by(made))


def _settled(resolved: spec.Spec) -> spec.Spec:
    from portaisys import launch

    settled = launch.settled(resolved)
    if settled != resolved:
        console.print(f"storage.path: {resolved.storage.path} would be deleted with the job's working directory; this job writes to {settled.storage.path}", soft_wrap=True)
    return settled


def compile_(options: argparse.Namespace) -> None:
    from portaisys import compile as compiling

    order = compiling.Order(
        options.onnx, options.name or compiling.name_of(options.onnx), options.calibration, tuple(options.precision or ("fp32",)), options.backend, options.objective,
        options.opt_batch, options.max_batch, tuple(options.dim), options.max_error, options.max_accuracy_drop, options.threads, storage=Storage(path=options.storage),
    )  # fmt: skip
    with Screen() as tell:
        made = compiling.compile_onnx(order, lambda text: tell("compile", text), promote=not options.no_promote)
        tell("compile", "done", 1.0, "done")
    compiled_table(made)


def benchmark(options: argparse.Namespace) -> None:
    from portaisys import compile as compiling

    with Screen() as tell:
        version, table = compiling.benchmark(options.reference, Storage(path=options.storage), options.batches, options.rounds, options.threads, lambda text: tell("benchmark", text))
        tell("benchmark", "done", 1.0, "done")
    console.print(timings_table(table, f"{version}, {options.threads} thread(s), {options.rounds} interleaved rounds"))


def predict(options: argparse.Namespace) -> None:
    from portaisys.serve.predict import answer_file

    opened, rows = answer_file(options.reference, options.data, options.out, Storage(path=options.storage), options.threads)
    console.print(answered_table(opened, rows, options.out))


def convert(options: argparse.Namespace) -> None:
    with Screen() as tell:
        tell("convert", f"{options.source} to {options.to}")
        made = _CONVERTERS[options.to](options)
        tell("convert", "done", 1.0, "done")
    console.print(converted_table(made))


def _to_savedmodel(options: argparse.Namespace) -> Any:
    from portaisys.convert import saved_model

    if options.overrides:
        raise UserError(f"{options.overrides[0]}: a version takes no overrides; leave it out")
    return saved_model(options.source, Storage(path=options.storage) if options.storage else Storage(), options.out)


def _to_tflite(options: argparse.Namespace) -> Any:
    from portaisys.tflite import of_run

    if options.storage:
        raise UserError(f"--storage: a spec says where its runs are; give storage.path={options.storage}")
    return of_run(_settled(spec.load(options.source, options.overrides)), options.out)


_CONVERTERS = {"savedmodel": _to_savedmodel, "tflite": _to_tflite}


def tune(options: argparse.Namespace) -> None:
    from portaisys import tune as searching

    problem = searching.read(Path(options.file), options.overrides)
    problem = replace(problem, base=_settled(problem.base))
    with Screen() as tell:
        found = searching.run(problem, tell)
    search_table(found, problem.base.search.objectives)


def demo(options: argparse.Namespace) -> None:
    from portaisys import demo as show

    show.run(spec.load(options.file, options.overrides), resume=options.resume)


def show_spec(options: argparse.Namespace) -> None:
    if options.schema:
        sys.stdout.write(spec.json_schema())
        return
    if not options.file:
        raise UserError("spec: name a file, or ask for --schema")
    sys.stdout.write(spec.to_yaml(spec.load(options.file, options.overrides)))


def versions(options: argparse.Namespace) -> None:
    console.print(versions_table(_registry(options).versions(options.name)))


def audit(options: argparse.Namespace) -> int:
    from portaisys import audit as auditing

    with Screen() as tell:
        found = auditing.audit(options.reference, Storage(path=options.storage), options.data, lambda text: tell("audit", text))
        tell("audit", "done", 1.0, "done")
    audit_table(found)
    if found.differs:
        print(f"{found.version} differs from its verdict: {'; '.join(found.differs)}", file=sys.stderr)
    return 1 if found.differs else 0


def promote(options: argparse.Namespace) -> None:
    registry = _registry(options)
    chosen = registry.resolve(options.reference)
    console.print(f"{registry.promote(chosen.name, chosen.version, options.because)} is in production")


def rollback(options: argparse.Namespace) -> None:
    console.print(f"{_registry(options).rollback(options.name, options.because)} is in production again")


def traffic(options: argparse.Namespace) -> None:
    from portaisys.serve.control import Canary, Shadow, Traffic, traffic_of

    registry = _registry(options)
    if options.canary or options.shadow or options.pin or options.clear:
        canary = Canary(str(options.canary), options.percent, options.by.lower()) if options.canary else None
        shadow = Shadow(str(options.shadow), options.shadow_percent) if options.shadow else None
        wanted = traffic_of(Traffic(canary, shadow, options.pin).to_dict()) if not options.clear else Traffic()
        registry.set_traffic(options.name, wanted.to_dict(), options.because)
    console.print_json(data={"name": options.name, **registry.traffic(options.name)})


def ledger(options: argparse.Namespace) -> None:
    registry = _registry(options)
    console.print(ledger_table(registry.ledger()))
    console.print(f"chain intact, last entry {registry.verify_ledger()[:12] or '(empty)'}")


def serve(options: argparse.Namespace) -> None:
    from portaisys.serve.app import ServeArgs
    from portaisys.serve.local import serving, until_stopped

    arguments = ServeArgs(
        model=options.reference, storage=Storage(path=options.storage), num_replicas=options.replicas, threads=options.threads,
        max_batch=options.max_batch, max_queue=options.max_queue,
    )  # fmt: skip
    console.print(f"starting {options.reference}")
    with serving(arguments, host=options.host, port=options.port) as url:
        console.print(f"ready: {url}/v2/models/{options.reference.partition('@')[0]}/infer (stop with Ctrl-C)", soft_wrap=True)
        until_stopped()


def key(options: argparse.Namespace) -> None:
    from portaisys.serve.keys import add_key

    secret = add_key(options.file, options.name, tuple(options.model or ("*",)), admin=options.admin)
    console.print(f"{options.name}: {secret}\nIt is written nowhere: keep it. {options.file} has its hash; servers that run read it when they start again.", soft_wrap=True, highlight=False)


def cache(options: argparse.Namespace) -> None:
    from portaisys.engine import cache as engines

    folder = Storage(cache=options.cache).cache_dir / "engines"
    if options.action == "prune" and options.max_gib < 0:
        raise UserError(f"--max-gib: {options.max_gib:g} is negative; 0 removes every engine")
    gone = []
    if options.action == "verify":
        gone = engines.remove_unsound(folder)
    elif options.action == "prune":
        gone = engines.prune(folder, int(options.max_gib * 2**30))
    console.print(entries_table(engines.entries(folder), folder))
    for entry in gone:
        console.print(f"removed {entry.key[:12]} ({entry.backend} {entry.precision}, {entry.size_bytes / 2**20:.1f} MiB){f': {entry.problem}' if entry.problem else ''}", soft_wrap=True)


def deploy(options: argparse.Namespace) -> None:
    from portaisys.serve.deploy import deploy as deploy_file

    for found in deploy_file(Path(options.file), options.address, lambda text: console.print(text, highlight=False, soft_wrap=True), timeout_s=options.timeout_s):
        console.print(f"{found.name} is {found.status} below {found.route}")


def _registry(options: argparse.Namespace) -> Any:
    from portaisys.registry import open_registry

    return open_registry(Storage(path=options.storage), create=False)


if __name__ == "__main__":
    sys.exit(main())
