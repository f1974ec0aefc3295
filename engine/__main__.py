"""python -m engine VERB ...: the verbs. Heavy imports sit inside them, so that --help and typos answer at once."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from engine import __version__, distributed
from engine.errors import EngineError

Parser = argparse.ArgumentParser
EXAMPLE = "example: python -m engine finetune bert_sentiment train.epochs=1 --out runs/try"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 / 143 stopped by a signal."""
    parser = build()
    options, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if "=" in a and not a.startswith("-")]
    unknown = [a for a in rest if a not in overrides]
    if unknown or (overrides and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if hasattr(options, "overrides"):
        options.overrides = [*options.overrides, *overrides]
    try:
        return int(options.run(options) or 0)
    except EngineError as error:
        if options.debug:
            raise
        return ended(f"error: {error}", error.code)
    except KeyboardInterrupt:
        return ended("stopped", 130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    except Exception as error:
        if options.debug:
            raise
        return ended(f"error: {type(error).__name__}: {error}\nThis is a fault of the engine, not yours; --debug shows where.", 1)


def ended(message: str, code: int) -> int:
    """Say why the process ends, once however many processes work together; returns the exit code that all of them have."""
    first, code = distributed.first_failure(code)
    if first:
        print(message, file=sys.stderr)
    return code


def build() -> Parser:
    """The command line."""
    parser = Parser("engine", description="The fastest fine-tuning that people can read.", epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(run: Callable[..., Any], about: str, recipe: bool = True) -> Parser:
        sub = verbs.add_parser(run.__name__.strip("_"), help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        if recipe:
            sub.add_argument("recipe", help="a name in recipes/, or a path")
            sub.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as train.epochs=1")
            sub.add_argument("--offline", action="store_true", help="use the recipe's offline: block")
            sub.add_argument("--allow-code", action="store_true", help="of a run's recipe: run the layer code in its folder")
        return sub

    sub = verb(finetune, "train, evaluate, report")
    sub.add_argument("--out", metavar="DIR", help="the run folder; default runs/RECIPE/STAMP")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out, or the newest of this recipe")
    verb(check, "the pre-flight: data audit, what would train, batch, steps, memory")
    verb(layers, "every module path with shape and parameters; what trains and what is frozen")
    sub = verb(evaluate, "metrics of a finished run on its test split, or on another file", recipe=False)
    sub.add_argument("run_folder", metavar="RUN")
    sub.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as data.columns.text=sentence")
    sub.add_argument("--data", metavar="FILE", help="rows with labels; of several tasks NAME=FILE")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--allow-code", action="store_true", help="run the layer code that the run folder holds")
    sub = verb(predict, "JSON lines: label and probabilities", recipe=False)
    sub.add_argument("run_folder", metavar="RUN")
    sub.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    given = sub.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", metavar="T", help="one text; may be given again")
    given.add_argument("--input", metavar="FILE", help="rows with texts")
    sub.add_argument("--output", metavar="FILE", help="where to write; default standard output")
    sub.add_argument(
        "--also", action="append", metavar="RUN", help="answer by this run too, as one more adapter on the same base"
    )
    sub.add_argument("--allow-code", action="store_true", help="run the layer code that the run folder holds")
    sub = verb(merge, "fold a run's adapter into plain weights, with a check", recipe=False)
    sub.add_argument("run_folder", metavar="RUN")
    sub.add_argument("--out", metavar="DIR", help="where to write; default RUN/merged")
    sub.add_argument("--allow-code", action="store_true", help="run the layer code that the run folder holds")
    sub = verb(describe, "every recipe key: meaning, type, default", recipe=False)
    sub.add_argument("key", nargs="?", help="a key or a group, such as train or train.clip")
    verb(recipes, "the list of recipes, a line each", recipe=False)
    return parser


def _recipe(options: Any) -> Any:
    from engine.recipe import load

    return load(options.recipe, options.overrides, offline=options.offline, allow_code=options.allow_code)


def finetune(options: Any) -> int:
    from engine.interrupt import Interrupt

    with Interrupt() as interrupt:  # before the heavy imports: a signal must find someone home
        distributed.start()
        recipe = _recipe(options)
        from engine.claim import own

        try:
            with own(recipe, options.out, options.resume) as owned:  # whose folder it is, too
                from engine.finetune import finetune as run

                code = run(recipe, claim=owned, interrupted=interrupt).code
        except KeyboardInterrupt:  # a loop outside training saw the flag
            return ended("stopped before training began; nothing was written", interrupt.code or 130)
        finally:
            if distributed.world() > 1:  # the launcher stops all as soon as one has ended
                interrupt.ignore()
        distributed.stop()
        return code


def check(options: Any) -> None:
    recipe = _recipe(options)
    from engine import preflight

    preflight.check(recipe)


def layers(options: Any) -> None:
    recipe = _recipe(options)
    from engine import preflight

    preflight.layers(recipe)


def evaluate(options: Any) -> None:
    from engine.predict import evaluate_run

    evaluate_run(options.run_folder, options.data, options.overrides, as_json=options.json, allow_code=options.allow_code)


def predict(options: Any) -> None:
    from engine.predict import predict_run

    o = options
    predict_run(o.run_folder, o.text, o.input, o.output, o.overrides, also=o.also, allow_code=o.allow_code)


def merge(options: Any) -> None:
    from engine.bases import merge_run

    merge_run(options.run_folder, options.out, allow_code=options.allow_code)


def describe(options: Any) -> None:
    from engine.errors import InputError, nearest
    from engine.keys import describe as rows

    table = rows()
    if options.key:
        chosen = [r for r in table if r[0] == options.key or r[0].startswith((options.key + ".", options.key + "[]"))]
        if not chosen:
            raise InputError(f"no key '{options.key}'{nearest(options.key, [r[0] for r in table])}")
        table = chosen
    width = max(len(r[0]) for r in table)
    for key, kind, default, meaning in table:
        print(f"{key:<{width}}  {meaning}\n{'':<{width}}    {kind}; default: {default}")


def recipes(options: Any) -> None:
    from engine.recipe import available

    found = available()
    width = max(map(len, found), default=0)
    for name, path in sorted(found.items()):
        first = next((line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")), "")
        print(f"{name:<{width}}  {first}")


if __name__ == "__main__":
    sys.exit(main())
