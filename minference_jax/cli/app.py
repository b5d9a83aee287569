"""The program: commands, exit statuses, errors.

Exit status: 0 done; 1 the run failed, or a comparison was outside its tolerance; 2 the command line is wrong; 130
interrupted; 143 terminated. An error is one line, `error: …`, on standard error; `--debug` shows where it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from minference_jax.cli import (
    advise,
    batch,
    bench,
    compare,
    convert,
    demo,
    eval,
    fetch,
    generate,
    inspect,
    search,
    summarize,
)
from minference_jax.cli.console import enable_compile_cache, use_most_of_the_gpu
from minference_jax.cli.stopping import Stopped, stoppable, words

# Typer exports this class's children only.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # pyright: ignore[reportAssignmentType]

app = typer.Typer(
    name="minference-jax",
    help="MInference for JAX: long prompts with dynamic sparse attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.command("fetch-demo-model")(fetch.fetch_demo_model)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("compare")(compare.compare)
app.command("advise")(advise.advise)
app.add_typer(bench.app, name="bench")
app.command("search")(search.search)
app.command("eval")(eval.evaluate)
app.command("batch")(batch.batch)
app.command("summarize")(summarize.summarize)
app.command("make-reviews")(summarize.make_reviews)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("minference-jax"))
        raise typer.Exit


@app.callback()
def _settings(
    debug: Annotated[bool, typer.Option(help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    use_most_of_the_gpu()
    enable_compile_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status; `arguments` defaults to those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            status = app(arguments, prog_name="minference-jax", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except _UsageError as error:
        message = getattr(error, "format_message", lambda: str(error))()
        return _fail(f"{message} (see minference-jax --help)" if message else "", status=2)
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        return _fail(*words(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone: nothing to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(_one_line(error), status=1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # These texts are written for the user. Others need their type to be understood: KeyError('x') prints 'x'.
    return (
        text
        if isinstance(error, ValueError | OSError | RuntimeError | ModuleNotFoundError) and text
        else f"{type(error).__name__}: {text}"
    )


def _fail(message: str, status: int) -> int:
    if message:
        print(f"error: {message}", file=sys.stderr)
    return status
