"""The command line: thin verbs over the packages (spec/cli.md).

Exit status: 0 done; 1 done but some inputs were bad; 2 bad arguments, config or file; 3 interrupted, state saved.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megarubric import __version__
from megarubric.arguments import count, seconds
from megarubric.errors import BadInput, MegarubricError
from megarubric.recipe.defence.options import defend_arguments
from megarubric.recipe.synthesis.options import synthesize_arguments

type Group = argparse._SubParsersAction[_Parser]  # argparse has no public name for it
Handler = Callable[[argparse.Namespace], int]


def _train(a: argparse.Namespace) -> int:
    from megarubric.launch.run import run_train

    return run_train(a.config, a.overrides, dry_run=a.dry_run, fresh=a.fresh)


def _sft(a: argparse.Namespace) -> int:
    from megarubric.sft import run_sft

    return run_sft(a.config, a.overrides, fresh=a.fresh)


def _eval(a: argparse.Namespace) -> int:
    if a.suite == "judge":
        return _eval_judge(a)
    if a.model is None:
        raise BadInput("command line", "--model", "names the policy to evaluate, and is missing")
    from megarubric.launch.run import run_eval

    return run_eval(a.config, a.overrides, model=a.model, out=a.out, as_json=a.json)


def _eval_judge(a: argparse.Namespace) -> int:
    from functools import partial

    from megarubric.config import load_train
    from megarubric.judging.verb import run_judge_eval
    from megarubric.launch.engines import judge_engine
    from megarubric.launch.judge import judge_use

    c = load_train(a.config, a.overrides)
    if a.labelled is None or a.rubrics is None:
        raise BadInput("command line", "--suite judge", "needs --rubrics and --labelled")
    use = judge_use(c, a.model, partial(judge_engine, dtype=c.model.dtype))
    return run_judge_eval(
        a.rubrics,
        a.labelled,
        Path(a.out),
        use,
        author=a.author,
        attacks=a.attacks,
        calibration_out=a.fit_calibration,
        as_json=a.json,
    )


def _score(a: argparse.Namespace) -> int:
    from megarubric.judging.opening import JudgeUse, settings_for
    from megarubric.judging.verb import run_score
    from megarubric.launch.engines import judge_engine

    use = JudgeUse(
        judge=a.judge,
        device=a.device,
        engine_factory=judge_engine,
        settings=settings_for(a.judge, a.template, a.mode, a.draws, a.temperature, a.timeout),
        cache=a.cache,
        replay_only=a.replay_only,
        second=a.second_judge,
        calibration=a.calibration,
        max_requests=a.max_requests,
    )
    return run_score(a.rubrics, a.responses, a.out, use, as_json=a.json)


def _filter(a: argparse.Namespace) -> int:
    from megarubric.launch.filter import run_filter

    return run_filter(a.config, a.overrides, fresh=a.fresh, retry_unscored=a.retry_unscored, as_json=a.json)


def _defend(a: argparse.Namespace) -> int:
    from megarubric.launch.engines import judge_engine
    from megarubric.recipe.defence.verb import run_defend

    return run_defend(a, judge_engine)


def _convert(a: argparse.Namespace) -> int:
    from megarubric.megatron.convert.verb import run_convert

    return run_convert(
        a.source,
        a.target,
        verified=a.verify,
        config=a.config_from,
        processes=a.processes,
        max_shard_size=a.max_shard_size,
        as_json=a.json,
    )


def _submit(a: argparse.Namespace) -> int:
    from megarubric.launch.slurm import run_submit

    return run_submit(a.config, a.overrides, dry_run=a.dry_run, chain=a.chain)


def _report(a: argparse.Namespace) -> int:
    from megarubric.observe.report import run_report

    return run_report(a.run_dir, a.out, as_json=a.json)


def _doctor(a: argparse.Namespace) -> int:
    from megarubric.launch.doctor import doctor

    return doctor(a.json)


def _rubrics_lint(a: argparse.Namespace) -> int:
    from megarubric.rubrics import commands

    return commands.lint(a.paths, as_json=a.json, fix=a.fix)


def _rubrics_stats(a: argparse.Namespace) -> int:
    from megarubric.rubrics import commands

    return commands.stats(a.paths, as_json=a.json)


def _rubrics_show(a: argparse.Namespace) -> int:
    from megarubric.rubrics import commands

    return commands.show(a.paths, ids=a.id, as_json=a.json)


def _rubrics_import(a: argparse.Namespace) -> int:
    from megarubric.rubrics import commands

    return commands.import_(a.paths, a.out, a.format, as_json=a.json)


def _rubrics_synthesize(a: argparse.Namespace) -> int:
    from functools import partial

    from megarubric.launch.engines import judge_engine
    from megarubric.recipe.synthesis.verb import job_of, run_synthesize

    return run_synthesize(job_of(a), partial(judge_engine, structured_output=True), dry_run=a.dry_run)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text (`--help` has it)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line, for `--help` and for tests."""
    top = _Parser(
        prog="megarubric", description="Reinforcement learning from rubric rewards: Megatron-Core, vLLM, rubrics."
    )
    top.add_argument("--version", action="version", version=f"megarubric {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, handler: Handler, help: str, group: Group = verbs) -> _Parser:
        p = group.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        p.set_defaults(handler=handler)
        return p

    def config(p: argparse.ArgumentParser) -> None:
        p.add_argument("config", metavar="CONFIG", help="YAML file (configs/ has them)")
        p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=1e-6")

    p = verb("train", _train, "the run: sample, judge, aggregate, train, exchange, evaluate")
    config(p)
    p.add_argument("--dry-run", action="store_true", help="print config, layout, memory and commands; start nothing")
    either = p.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint (the default; for scripts)"
    )
    either.add_argument("--fresh", action="store_true", help="move an earlier run of this name aside and start anew")

    p = verb("sft", _sft, "supervised cold start with the same trainer")
    config(p)
    p.add_argument("--fresh", action="store_true", help="move an earlier run of this name aside and start anew")

    p = verb("eval", _eval, "evaluate a model on a config's held-out prompts; writes eval.json and a table")
    config(p)
    p.add_argument("--model", metavar="DIR", help="Hugging Face directory of the policy (or judge) to evaluate")
    p.add_argument("--suite", choices=("heldout", "judge"), default="heldout", help="what is measured")
    p.add_argument("--rubrics", type=Path, metavar="FILE", help="suite judge: rubrics of the labelled answers")
    p.add_argument("--labelled", type=Path, metavar="FILE", help="suite judge: answers with known judgements, JSONL")
    p.add_argument("--attacks", type=count, default=8, metavar="N", help="suite judge: answers to attack (default 8)")
    p.add_argument("--author", metavar="NAME", help="suite judge: the judge's own name among the answers' authors")
    p.add_argument("--fit-calibration", type=Path, metavar="FILE", help="suite judge: write the labels' calibration")
    p.add_argument("--out", metavar="FILE", default="eval.json", help="where the result goes (default eval.json)")
    p.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")

    p = verb("score", _score, "judge and aggregate stored responses")
    p.add_argument("--rubrics", type=Path, required=True, metavar="FILE", help="rubric file or directory")
    p.add_argument("--responses", type=Path, required=True, metavar="FILE", help="JSONL, one response a line")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL, one score a line, same order")
    p.add_argument("--judge", default="none", metavar="none|MODEL_DIR|URL", help="who judges what is not stored")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where scores are aggregated")
    p.add_argument("--template", metavar="NAME|FILE", help="prompt of the chosen mode (default: what fits the judge)")
    p.add_argument("--mode", choices=("tier", "reason", "all"), default="tier", help="how criteria are asked")
    p.add_argument("--draws", type=int, default=1, metavar="N", help="modes reason and all: median of N replies")
    p.add_argument("--temperature", type=float, metavar="T", help="of the draws (default 0, or 0.7 for several)")
    p.add_argument("--second-judge", metavar="MODEL_DIR|URL", help="asked where the first is unsure or unread")
    p.add_argument("--calibration", type=Path, metavar="FILE", help="corrects the judge's scores (eval makes it)")
    p.add_argument("--timeout", type=seconds, default=120.0, metavar="S", help="seconds for one call (default 120)")
    p.add_argument("--max-requests", type=count, default=0, metavar="N", help="budget of a URL; beyond it: unread")
    p.add_argument("--cache", type=Path, metavar="FILE", help="SQLite file of judgements: nothing is judged twice")
    p.add_argument("--replay-only", action="store_true", help="with --cache: ask no judge at all")
    p.add_argument("--json", action="store_true", help="print the counts as JSON")

    p = verb("filter", _filter, "keep the training prompts in the central quantile of the score distribution")
    config(p)
    p.add_argument("--fresh", action="store_true", help="move an earlier filter of this run aside and start anew")
    p.add_argument("--retry-unscored", action="store_true", help="ask again what came back without any score")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")

    p = verb("defend", _defend, "mine a run's answers for reward hacking and propose a defence rubric")
    defend_arguments(p)

    p = verb("convert", _convert, "Hugging Face <-> Megatron checkpoints; the direction is told from SRC")
    p.add_argument("source", type=Path, metavar="SRC", help="Hugging Face directory, or distributed checkpoint")
    p.add_argument("target", type=Path, metavar="DST", help="directory to make")
    p.add_argument("--verify", action="store_true", help="compare bit for bit with SRC (only that, if DST is there)")
    p.add_argument(
        "--config-from", type=Path, metavar="DIR", help="where config.json and tokenizer are, for a SRC without them"
    )
    p.add_argument("--max-shard-size", metavar="SIZE", help="of a safetensors file, e.g. 5GB (default: as SRC was)")
    p.add_argument("--processes", type=int, default=0, metavar="N", help="default: one a core, at most 8")
    p.add_argument("--json", action="store_true", help="print the result as JSON")

    p = verb("submit", _submit, "render the Slurm job of a run (`slurm:` in the config) and submit it")
    config(p)
    p.add_argument("--dry-run", action="store_true", help="print the batch script; submit nothing")
    p.add_argument("--chain", type=count, default=1, metavar="N", help="N jobs, one after the other, each resuming")

    p = verb("report", _report, "one self-contained HTML file about a run: curves, samples, hacking signals")
    p.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory, e.g. runs/quickstart")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (default RUN_DIR/report.html)")
    p.add_argument("--json", action="store_true", help="print the headline and the signals as JSON")

    p = verb("doctor", _doctor, "what this machine can run")
    p.add_argument("--json", action="store_true")

    group = verbs.add_parser("rubrics", help="corpus work", description="Corpus work.")
    corpus = group.add_subparsers(dest="corpus_verb", required=True, metavar="VERB")
    p = verb("lint", _rubrics_lint, "find what makes a rubric easy to game or hard to judge", corpus)
    p.add_argument("paths", nargs="+", metavar="PATH")
    p.add_argument("--fix", action="store_true", help="mend what can be mended safely, in place")
    p.add_argument("--json", action="store_true", help="rows {file, rubric, criterion, rule, message}")
    p = verb("stats", _rubrics_stats, "count rubrics, criteria, weights and sources", corpus)
    p.add_argument("paths", nargs="+", metavar="PATH")
    p.add_argument("--json", action="store_true")
    p = verb("show", _rubrics_show, "print rubrics, readable", corpus)
    p.add_argument("paths", nargs="+", metavar="PATH")
    p.add_argument("--id", action="append", default=[], help="only this rubric (may be repeated)")
    p.add_argument("--json", action="store_true")
    p = verb("import", _rubrics_import, "read other projects' rubrics into one corpus file", corpus)
    p.add_argument("paths", nargs="+", metavar="PATH")
    p.add_argument("--out", required=True, metavar="FILE", help="JSONL corpus file to write")
    p.add_argument("--format", help="told from the first line of each file when not given")
    p.add_argument("--json", action="store_true")
    p = verb("synthesize", _rubrics_synthesize, "have models draft rubrics, and keep what holds on answers", corpus)
    synthesize_arguments(p)
    return top


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. argparse fills `key=value ...` once, before the first option; those behind it are added here."""
    top = parser()
    a, rest = top.parse_known_args(argv)
    if rest and (not hasattr(a, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        a.overrides += rest
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; an error a user can cause is one line on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # rubrics hold any language; a terminal's encoding may not
        sys.stdout.reconfigure(errors="backslashreplace")
    a = _parsed(argv)
    handler: Handler = a.handler
    try:
        return handler(a)
    except MegarubricError as error:
        print(f"megarubric {a.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"megarubric {a.verb}: interrupted", file=sys.stderr)
        return 3
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        line = BadInput(error.filename or "system", None, error.strerror or str(error))
        print(f"megarubric {a.verb}: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
