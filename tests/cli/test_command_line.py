"""The command line itself: its help, its exit codes, and what it says to wrong words."""

import dataclasses
import re
import typing

import pytest

import fnml
from fnml.cli import main
from fnml.cli._main import COMMANDS
from fnml.recipes import FLAT, Output, SampleConfig, find_recipe


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command line in this process: ``(exit code, stdout, stderr)``."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("help",)])
def test_usage_lists_every_command(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)


def test_version(call):
    assert call("--version") == (0, f"fnml {fnml.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "'train'"), ("Resume", "'resume'"), ("--verison", "'--version'"), ("run", "'runs'")],
)
def test_an_unknown_command_names_the_nearest(call, word, hint):
    code, out, err = call(word)
    assert (code, out) == (2, "")
    assert f"there is no command {word!r}. Did you mean {hint}" in err
    assert "usage: fnml COMMAND" in err


def options_of(cls, prefix=""):
    """Return the options that a configuration has on the command line."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, flat = hints[field.name], False
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
            flat = FLAT in marks
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, prefix if flat else f"{name}.")
        else:
            yield f"--{name}"


def explained(out):
    """Return each option of a help text with its explanation."""
    text = re.sub(r"[│╭╮╰╯─]", " ", out)
    parts = re.split(r"\s(?=--?(?!no-)[a-z][a-z0-9.-]*[ ,])", text)
    found = {}
    for part in parts:
        if match := re.match(r"(--[a-z0-9.-]+)", part):
            found[match[1]] = " ".join(part.split())
    return found


@pytest.mark.parametrize("name", ["digits", "lm", "finetune"])
def test_a_recipes_help_explains_every_option(call, name):
    code, out, err = call("train", name, "--help")
    assert (code, err) == (0, "")
    expected = {*options_of(find_recipe(name).config), *options_of(Output), "--out"}
    found = explained(out)
    assert expected <= found.keys()
    for option in expected:
        # A sentence, and not just its default.
        assert re.search(r"[A-Za-z0-9)\"].*\. .*\(default", found[option]), found[option]
    assert find_recipe(name).summary in " ".join(re.sub("│", "", out).split())


@pytest.mark.parametrize("name", ["digits", "lm", "finetune"])
def test_train_help_lists_the_recipes(call, name):
    for flag in ("-h", "--help"):
        code, out, err = call("train", flag)
        assert (code, err) == (0, "")
        assert f"  {name:<9} {find_recipe(name).summary}" in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("resume", ["The run directory.", "--devices"]),
        ("eval", ["The run directory.", "--step", "by default the newest", "--data", "--loss"]),
        ("export", ["The run directory.", "--to", "--opset", "--dynamic"]),
        ("sample", ["The run directory.", "--step", *options_of(SampleConfig)]),
        ("runs", ["Run directories to compare"]),
        ("verify", ["Check every file", "fnml verify crash RECIPE"]),
        ("replay", ["Rebuild the exact state", "--step", "--save"]),
        ("diff", ["Find where two runs part"]),
        ("doctor", ["Show versions, devices"]),
        ("plugins", ["List what installed packages"]),
        ("laws", ["Check the laws", "--example", "--devices"]),
        ("check", ["finite differences"]),
        ("launch", ["--processes", "--restarts"]),
        ("plan", ["for chips that are not there", "--target"]),
        ("bench", ["take turns", "--install-peers", "startup"]),
    ],
)
def test_every_other_command_has_help(call, command, words):
    for flag in ("-h", "--help"):
        code, out, err = call(command, flag)
        assert (code, err) == (0, "")
        assert [word for word in words if word not in out] == []


def test_every_command_is_covered_here():
    using = {"train", "resume", "eval", "sample", "export", "runs"}
    using |= {"verify", "replay", "diff"}
    assert set(COMMANDS) == using | {
        "laws",
        "check",
        "doctor",
        "plugins",
        "bench",
        "launch",
        "plan",
    }


def test_an_unknown_recipe_names_the_nearest(call):
    code, out, err = call("train", "digist")
    assert (code, out) == (1, "")
    assert "there is no recipe 'digist'. Did you mean 'digits'? There are: digits, lm" in err


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--stpes", "--steps"),
        ("--learning-rat", "--learning-rate"),
        ("--mlp.hiden", "--mlp.hidden"),
    ],
)
def test_an_unknown_option_names_the_nearest(call, option, nearest):
    code, out, err = call("train", "digits", option, "5")
    assert code == 2
    assert f"Unrecognized options: {option}" in out + err
    assert nearest in out + err


@pytest.mark.parametrize("level", ["loud", "10", "notset", "warn ing"])
def test_a_wrong_log_level_is_refused(call, monkeypatch, level):
    monkeypatch.setenv("FNML_LOG_LEVEL", level)
    code, out, err = call("--version")
    assert (code, out) == (1, "")
    assert err == f"fnml: FNML_LOG_LEVEL={level}: expected debug, info, warning or error\n"


@pytest.mark.parametrize("level", ["", "debug", "INFO", "Warning", "error"])
def test_log_levels_in_any_case(call, monkeypatch, level):
    monkeypatch.setenv("FNML_LOG_LEVEL", level)
    assert call("--version")[0] == 0


def test_debugging_shows_where_an_error_was_raised(call, monkeypatch, caplog):
    monkeypatch.setenv("FNML_LOG_LEVEL", "debug")
    assert call("train", "digist")[0] == 1
    assert "Traceback" in caplog.text and "find_recipe" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FNML_LOG_LEVEL", "info")
    assert call("train", "digist")[0] == 1
    assert caplog.text == ""


def raising(error):
    def command(arguments):
        raise error

    return lambda name: command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 1, "fnml: [Errno 28] No space left on device\n"),
        (MemoryError("Unable to allocate 7 GiB"), 1, "not enough memory: Unable to allocate 7 GiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "fnml: RESOURCE_EXHAUSTED"),
        (RuntimeError("Unable to initialize backend 'x'"), 1, "fnml: Unable to initialize"),
        (KeyboardInterrupt(), 130, "fnml: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_the_machine_does_is_said_in_one_line(call, monkeypatch, error, code, said):
    monkeypatch.setattr("fnml.cli._main._load", raising(error))
    found, _, err = call("doctor")
    assert found == code
    assert said in err and err.count("\n") == bool(said)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("fnml.cli._main._load", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_notes_on_an_error_are_shown_too(call, monkeypatch):
    error = fnml.FnmlError("the loss is NaN")
    error.add_note("Besides, step 7 was not saved")
    error.add_note("--------------------\nJAX has removed its frames")
    monkeypatch.setattr("fnml.cli._main._load", raising(error))
    assert call("doctor") == (1, "", "fnml: the loss is NaN\nBesides, step 7 was not saved\n")
