"""The command line: parses, calls one verb, prints. Exit codes: 0 done, 1 a check failed, 2 bad input."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError

EXPORT_DEFAULT = "exported"
RUNTIMES = ("executorch", "executorch-forward", "onnxruntime", "executorch-qnn", "onnx-qnn", "eager")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"keydiff-export: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    _quiet()
    try:
        return int(options.verb(options))
    except UserError as error:
        print(f"keydiff-export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("keydiff-export: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="keydiff-export", description="Decoder LLMs that read prompts of any length in constant memory."
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    export = verbs.add_parser("export", help="lower a model for phones and prove it equal to the reference")
    export.add_argument("card", nargs="?", type=Path, help="graph card: a folder with spec.yaml")
    export.add_argument("--model", help="model folder, .gguf file, hub id or package:NAME/FILE")
    export.add_argument("--budget", type=int, metavar="N", help="tokens held a layer and KV head")
    export.add_argument("--block", type=int, metavar="B", help="tokens read a prefill step")
    export.add_argument(
        "--policy", metavar="NAME[:KEY=VALUE,...]", help="eviction policy, see `keydiff-export policies`"
    )
    export.add_argument("--recent", type=float, help="share of the budget kept for the most recent tokens")
    export.add_argument("--pinned", type=int, metavar="K", help="the first K positions never leave")
    export.add_argument("--system-prompt", metavar="TEXT", help="opens every chat; its tokens never leave")
    export.add_argument("--quant", help="none, 8da4w, 8da4w-head4, int8 or int4; for NPUs fp16, 16a8w or 16a4w")
    export.add_argument("--cache-dtype", help="float32, float16 or int8: what keys and values are stored as")
    export.add_argument("--evict-every", type=int, metavar="K", help="generated tokens leave K at a time (default 1)")
    export.add_argument(
        "--stock-runner",
        action=argparse.BooleanOptionalAction,
        help="method `forward` in a .pte, for ExecuTorch's own LLM runner and the app (default: yes)",
    )
    export.add_argument("--target", help="comma-separated, see `keydiff-export targets`")
    export.add_argument("--soc", help="chip that NPU targets are compiled for: SM8650 (default), SM8750 or SM8850")
    export.add_argument("--compile", action="store_true", help="NPU targets also write what a phone loads")
    export.add_argument("--calibration", metavar="PATH", help="text file or folder for quantised NPU targets")
    export.add_argument("-o", "--output", type=Path, help=f"output folder (default {EXPORT_DEFAULT}/NAME)")
    export.add_argument("--no-validate", action="store_true", help="skip the parity run at the end")
    export.set_defaults(verb=_export)

    validate = verbs.add_parser("validate", help="parity of every artifact against the eager reference")
    validate.add_argument("folder", type=Path)
    validate.add_argument("--json", action="store_true")
    validate.set_defaults(verb=_validate)

    run = verbs.add_parser("run", help="answer a prompt of any length")
    run.add_argument("folder", type=Path)
    source = run.add_mutually_exclusive_group()
    source.add_argument("--prompt-file", type=Path, help="UTF-8 text; standard input without it")
    source.add_argument("--prompt", help="the prompt itself")
    run.add_argument("--max-new-tokens", type=int, default=128)
    run.add_argument("--runtime", choices=RUNTIMES, help="default: the first artifact's")
    run.add_argument("--raw", action="store_true", help="no chat template")
    run.add_argument("--temperature", type=float, default=0.0)
    run.add_argument("--top-p", type=float, default=1.0)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int)
    run.add_argument("--allow-beyond-trained-context", action="store_true")
    run.add_argument("--json", action="store_true")
    run.set_defaults(verb=_run)

    inspect = verbs.add_parser("inspect", help="methods, slots, memory plan, operators and delegation")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--delegation", action="store_true", help="what eviction adds to every lowered graph")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(verb=_inspect)

    bench = verbs.add_parser("bench", help="an export beside its peers, or what policies cost a layer")
    bench.add_argument("folder", nargs="?", type=Path, metavar="OUT", help="exported folder to measure")
    bench.add_argument(
        "--against", nargs="+", metavar="NAME[=PATH]", help="peers: onnxruntime-genai, llama.cpp, export_llm"
    )
    bench.add_argument("--prompt-tokens", metavar="T,...", help="default 512,2048,7900,32768")
    bench.add_argument("--decode-tokens", type=int, help="tokens generated behind each prompt (default 32)")
    bench.add_argument("--repeats", type=int, help="measurements of each, in turn (default 3)")
    bench.add_argument("--threads", type=int, help="CPU threads of all (default 2)")
    bench.add_argument("--time-limit", type=float, metavar="SECONDS", help="most a measurement may take (default 1800)")
    bench.add_argument(
        "--max-others", type=float, metavar="SHARE", help="leave out what ran beside busier other processes, e.g. 0.1"
    )
    bench.add_argument("--plots", type=Path, metavar="FOLDER", help="PNG plots, needs keydiff-export[bench]")
    bench.add_argument("--policies", help="instead of OUT: all, or NAME[:KEY=VALUE,...] separated by spaces")
    bench.add_argument("--target", help="with --policies (default executorch-xnnpack,onnx-cpu)")
    bench.add_argument("--slots", help="with --policies: N + B (default 512,1024,2048,4096,8192)")
    bench.add_argument("--block", type=int, metavar="B", help="with --policies (default 128)")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(verb=_bench)

    doctor = verbs.add_parser("doctor", help="what is installed and what each target needs")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(verb=_doctor)
    plan = verbs.add_parser(
        "plan",
        help="memory and speed of an export before it is made, from config.json alone",
        description="Without --budget, N is the largest multiple of B that fits --ram, is no more than the context and "
        "lets a token read no more bytes of cache than of weights. Speeds are predicted from bytes and FLOPs.",
    )
    plan.add_argument("--model", help="folder with config.json, or hub id")
    plan.add_argument("--context", metavar="TOKENS", help="length of the prompt, such as 32k")
    plan.add_argument("--ram", metavar="SIZE", help="memory that the artifact may take, such as 6GB")
    plan.add_argument("--budget", type=int, metavar="N", help="tokens held a layer and KV head")
    plan.add_argument("--block", type=int, default=128, metavar="B", help="tokens read a prefill step")
    plan.add_argument("--quant", default="8da4w", help="none, 8da4w, 8da4w-head4, int8 or int4")
    plan.add_argument("--cache-dtype", default="float32", help="float32, float16 or int8")
    plan.add_argument("--target", default="executorch-xnnpack", help="executorch-xnnpack or onnx-cpu")
    plan.add_argument("--device", default="cpu", help="whose processor, or `list`")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(verb=_plan)

    for name, text in (
        ("models", "supported architectures"),
        ("policies", "eviction policies"),
        ("targets", "targets"),
    ):
        listing = verbs.add_parser(name, help=text)
        listing.set_defaults(verb=_list, what=name, attempt=False)
        if name == "targets":
            listing.add_argument(
                "--attempt", action="store_true", help="also lower the NPU graph for every other delegate of ExecuTorch"
            )
    return parser


def _quiet() -> None:
    """Keeps library chatter out of the output; errors still raise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torch", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _export(options: argparse.Namespace) -> int:
    from .commands.export import export_model
    from .policies import parse_policy
    from .spec import ExportSpec, load_card

    given: dict[str, Any] = {
        key: getattr(options, key)
        for key in (
            "model",
            "budget",
            "block",
            "quant",
            "cache_dtype",
            "evict_every",
            "system_prompt",
            "stock_runner",
            "soc",
            "calibration",
        )
        if getattr(options, key) is not None
    }
    if options.compile:
        given["compile"] = True
    if options.target is not None:
        given["targets"] = tuple(name.strip() for name in options.target.split(",") if name.strip())
    if options.card is not None:
        fields = {**load_card(options.card).to_dict(), **given}
        fields["targets"] = tuple(fields["targets"])
    else:
        for key in ("model", "budget", "block"):
            if key not in given:
                raise UserError(f"--{key} is missing: give a graph card, or --model, --budget and --block")
        fields = given
    policy = dict(fields.get("policy", {"name": "keydiff"}))
    if options.policy is not None:
        policy = parse_policy(options.policy)
    for key in ("recent", "pinned"):
        if getattr(options, key) is not None:
            policy[key] = getattr(options, key)
    spec = ExportSpec(**{**fields, "policy": policy})
    name = spec.name or Path(spec.model).stem
    output = options.output or Path(EXPORT_DEFAULT) / name
    _disable_library_bars()
    export_model(
        spec,
        output,
        validate=not options.no_validate,
        report=lambda phase, seconds: print(f"{phase:<36}{seconds:>8.1f} s", flush=True),
    )
    print(f"exported {output}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .commands.validate import validate_folder
    from .manifest import PARITY, open_folder, write_json

    folder = open_folder(options.folder)
    _disable_library_bars()
    with tqdm(desc="parity", unit=" tokens", disable=None, file=sys.stderr) as bar:

        def read(tokens: int) -> None:
            bar.update(tokens)

        report = validate_folder(folder, tick=read)
    write_json(folder.path / PARITY, report)
    print(json.dumps(report, indent=2) if options.json else parity_table(report))
    return 0 if all(artifact["passed"] for artifact in report["artifacts"]) else 1


def parity_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [f"parity over {report['prompt_tokens']} prompt tokens and {report['greedy_tokens']} greedy tokens"]
    for artifact in report["artifacts"]:
        kept = artifact["kept_slots"]
        lines.append(f"\n{artifact['target']} ({artifact['quant']}): {'PASS' if artifact['passed'] else 'FAIL'}")
        if "prompt_tokens" in artifact:
            lines.append(f"  {artifact['prompt_tokens']} prompt tokens and {artifact['greedy_tokens']} greedy tokens")
        for gate in artifact["gates"]:
            value = "exact" if gate["value"] is None else f"{gate['value']:.4g}"
            lines.append(f"  {'ok  ' if gate['passed'] else 'FAIL'} {gate['name']:<56}{value:>10}  {gate['limit']}")
        if kept is None:
            continue
        lines.append(f"  kept sets equal {kept['sets_equal']} of {kept['sets_compared']} (layer x KV head x step)")
        shares = [
            (share, layer, head)
            for layer, heads in enumerate(kept["by_layer_and_head"])
            for head, share in enumerate(heads)
            if share < 1
        ]
        if shares:
            where = ", ".join(f"layer {layer} head {head} {share:.0%}" for share, layer, head in sorted(shares)[:3])
            lines.append(f"  fewest equal sets: {where}; parity.json lists every disagreement with its score gap")
        lines.append(
            f"  worst row error: key {kept['worst_key_row_error']:.2e}, value {kept['worst_value_row_error']:.2e}"
        )
        for name, title in (("reference", "against reference"), ("float32", "against float32")):
            part = artifact[name]
            sqnr = "exact" if part["sqnr_db"] is None else f"{part['sqnr_db']:.1f} dB"
            lines.append(
                f"  {title}: logits max abs {part['logits_max_abs']:.2e}, KL {part['kl']:.2e}, "
                f"SQNR {sqnr}, tokens {part['token_agreement']:.1%}"
            )
    return "\n".join(lines)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .commands.run import read_prompt, run_prompt
    from .generation import Sampling
    from .manifest import open_folder

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    folder = open_folder(options.folder)
    text = read_prompt(options.prompt_file, options.prompt, sys.stdin.buffer.read)
    budget = folder.shape.budget
    _disable_library_bars()
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}<{remaining}{postfix}]"
    hidden = True if options.json else None
    bar = tqdm(desc="reading", total=1, bar_format=layout, disable=hidden, file=sys.stderr)

    def progress(read: int, total: int, rate: float, held: int) -> None:
        bar.total = total
        bar.set_postfix_str(f"{rate:.0f} tokens/s, cache {held}/{budget}", refresh=False)
        bar.update(read - bar.n)
        if read >= total:
            bar.close()

    result = run_prompt(
        folder,
        text,
        max_new_tokens=options.max_new_tokens,
        runtime=options.runtime,
        raw=options.raw,
        sampling=sampling,
        allow_beyond_trained_context=options.allow_beyond_trained_context,
        threads=options.threads,
        progress=progress,
        emit=(lambda piece: None) if options.json else (lambda piece: print(piece, end="", flush=True)),
    )
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    decode = "-" if result.decode_tokens_per_s is None else f"{result.decode_tokens_per_s:.1f}"
    print(
        f"\n\n{result.prompt_tokens} prompt tokens, first token after {result.ttft_s:.2f} s "
        f"({result.prefill_tokens_per_s:.0f} tokens/s), {decode} tokens/s after it; "
        f"{result.evictions} evicted a head, {result.cache_slots} slots, peak {result.peak_rss_bytes / 1e6:.0f} MB",
        file=sys.stderr,
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .inspection import inspect_folder
    from .manifest import open_folder

    if options.delegation:
        from .commands.delegation import delegation_table, price_eviction

        _disable_library_bars()
        priced = price_eviction(open_folder(options.folder))
        print(json.dumps(priced, indent=2) if options.json else delegation_table(priced))
        return 0
    report = inspect_folder(open_folder(options.folder))
    print(json.dumps(report, indent=2) if options.json else inspection_table(report))
    return 0 if all(artifact["constant_memory"] for artifact in report["artifacts"]) else 1


def inspection_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    cache = report["cache"]
    lines = [
        f"{report['name']}: {report['model']['architecture']}, policy {report['policy']}",
        f"cache: {cache['layers']} layers x {cache['kv_heads']} KV heads x {cache['slots']} slots "
        f"(N {cache['budget']} + B {cache['block']}), {cache['bytes'] / 1e6:.1f} MB",
    ]
    for artifact in report["artifacts"]:
        verdict = "constant" if artifact["constant_memory"] else "NOT CONSTANT"
        sizes = f"{artifact['dynamic_tensors']} ({artifact['unbounded_tensors']} without a bound)"
        lines.append(
            f"\n{artifact['target']} ({artifact['quant']}), {artifact['bytes'] / 1e6:.1f} MB: memory {verdict}; slots "
            f"in the program {artifact['slots']}, tensors of dynamic size {sizes}"
        )
        for name, method in artifact["methods"].items():
            planned = method["planned_memory_bytes"]
            memory = "" if planned is None else f", planned memory {planned / 1e6:.1f} MB"
            delegates = ", ".join(f"{n} x {count}" for n, count in method["delegates"].items()) or "none"
            lines.append(f"  {name}: inputs {method['inputs']}, delegates {delegates}{memory}")
            kernels = ", ".join(f"{n} {count}" for n, count in method["kernels_outside_delegates"].items())
            lines.append(f"    kernels outside delegates: {kernels or 'none'}")
            if "why_outside" in method:
                lines.append(f"    because: {method['why_outside']}")
    return "\n".join(lines)


_BENCH_FOLDER = ("against", "prompt_tokens", "decode_tokens", "repeats", "threads", "time_limit", "max_others", "plots")
_BENCH_POLICIES = ("target", "slots", "block")


def _bench(options: argparse.Namespace) -> int:
    if (options.folder is None) == (options.policies is None):
        raise UserError("bench takes either OUT, an exported folder, or --policies")
    of_other = _BENCH_FOLDER if options.folder is None else _BENCH_POLICIES
    for key in of_other:
        if getattr(options, key) is not None:
            here = "--policies" if options.folder is None else "OUT"
            raise UserError(f"--{key.replace('_', '-')} does not go with bench {here}")
    for key in ("prompt_tokens", "slots"):
        if (text := getattr(options, key)) is not None:
            setattr(options, key, _sizes(key.replace("_", "-"), text))
    return _bench_policies(options) if options.folder is None else _bench_folder(options)


def _bench_folder(options: argparse.Namespace) -> int:
    from .commands.bench_folder import bench_folder, folder_table
    from .commands.plots import check_plots, draw_plots
    from .manifest import open_folder

    if options.plots is not None:
        check_plots(options.plots)
    given = {key: value for key in _BENCH_FOLDER if key != "plots" and (value := getattr(options, key)) is not None}
    report = bench_folder(open_folder(options.folder), **given, report=_progress)
    if options.plots is not None:
        for file in draw_plots(report, options.plots):
            _progress(f"wrote {file}")
    print(json.dumps(report, indent=2) if options.json else folder_table(report))
    failed = any(run["status"].startswith("failed") for run in report["runs"])
    return 1 if failed else 0


def _bench_policies(options: argparse.Namespace) -> int:
    from .commands.bench import bench_all, bench_table

    report = bench_all(
        options.policies.split(),
        [name.strip() for name in (options.target or "executorch-xnnpack,onnx-cpu").split(",")],
        options.slots or [512, 1024, 2048, 4096, 8192],
        128 if options.block is None else options.block,
        report=_progress,
    )
    print(json.dumps(report, indent=2) if options.json else bench_table(report))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .commands.doctor import diagnose, doctor_table

    report = diagnose()
    print(json.dumps(report, indent=2) if options.json else doctor_table(report))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .commands.plan import parse_bytes, parse_tokens, plan_model, plan_table
    from .devices import DEVICES
    from .plan import Request

    if options.device == "list":
        print("\n".join(DEVICES))
        return 0
    for key in ("model", "context"):
        if getattr(options, key) is None:
            raise UserError(f"--{key} is missing: give --model FOLDER_OR_HUB_ID --context 32k")
    report = plan_model(
        options.model,
        Request(
            context=parse_tokens(options.context),
            block=options.block,
            target=options.target,
            quant=options.quant,
            device=options.device,
            ram=None if options.ram is None else parse_bytes(options.ram),
            budget=options.budget,
            cache_dtype=options.cache_dtype,
        ),
    )
    print(json.dumps(report, indent=2) if options.json else plan_table(report))
    return 0 if report["fits"] else 1


def _sizes(name: str, text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise UserError(f"{name} must be whole numbers separated by commas, got {text!r}") from error


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(options: argparse.Namespace) -> int:
    if options.what == "models":
        from .models import ARCHITECTURES

        print("\n".join(ARCHITECTURES))
    elif options.what == "policies":
        from .policies import policy_class, policy_names

        for name in policy_names():
            try:
                policy = policy_class(name)
            except UserError as error:
                print(f"{name:<10}not available: {error}")
                continue
            options_of = ", ".join(f"{f.name}={f.default}" for f in fields(policy))
            print(f"{name:<10}{(policy.__doc__ or '').strip().splitlines()[0]}")
            print(f"{'':<10}needs {policy().needs()}; options {options_of}")
    else:
        from .lowering import TARGETS, get_target

        for name in TARGETS:
            try:
                target = get_target(name)
                print(f"{name:<22}{target.summary}; --quant {', '.join(target.quants)}")
            except UserError as error:
                print(f"{name:<22}not available: {error}")
        if options.attempt:
            from .commands.attempts import BACKENDS, attempt

            for backend in BACKENDS:
                found = attempt(backend)
                print(f"{backend:<22}{found.verdict}: {found.detail}", flush=True)
    return 0


def _disable_library_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
