"""Configurations of commands: a YAML file, then `key=value` overrides, checked by a pydantic model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ..errors import ConfigError

Model = TypeVar("Model", bound=pydantic.BaseModel)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 3e-3 is a string in YAML 1.1


def read_config(model: type[Model], arguments: Sequence[str]) -> Model:
    """`read_values`, checked by a model.

    Raises:
        ConfigError: also when a key is unknown (the nearest one is named) or a value is wrong.
    """
    return check(model, read_values(arguments))


def read_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads `[FILE] [KEY=VALUE ...]`; later values win, and `adapter.r=4` reaches into a section.

    Raises:
        ConfigError: the file is missing or not YAML, or a key reaches into a value.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals:
            _set(values, key.strip().split("."), parse_value(text), argument)
        elif argument.endswith((".jsonl", ".jsonl.gz")):
            raise ConfigError(
                f"got {argument!r}, expected a YAML file or KEY=VALUE; rows are data={argument}"
            )
        elif values:
            raise ConfigError(f"got {argument!r}, expected KEY=VALUE; only the first argument may be a file")
        else:
            values = _read_yaml(Path(argument))
    return values


def check(model: type[Model], values: dict[str, Any]) -> Model:
    """The model built from values; its errors as one ConfigError."""
    for key in values:
        if key not in model.model_fields:
            close = difflib.get_close_matches(str(key), model.model_fields, n=1)
            nearest = f"the nearest valid key is {close[0]!r}; " if close else ""
            raise ConfigError(f"unknown key {key!r}; {nearest}valid keys: {', '.join(model.model_fields)}")
    try:
        return model(**values)
    except pydantic.ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            reason = problem["msg"].removeprefix("Value error, ")
            got = "" if isinstance(problem["input"], dict) else f" got {problem['input']!r}:"
            problems.append(f"{name}:{got} {reason[0].lower()}{reason[1:]}")
        raise ConfigError("; ".join(problems)) from None


def parse_value(text: str) -> Any:
    """A value as YAML reads it, and `3e-3` as the number it is."""
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        return text  # such as a pattern with a colon or a bracket


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file or KEY=VALUE"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {type(values).__name__}, expected keys and values")
    return _numbers(values)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _set(values: dict[str, Any], keys: list[str], value: Any, argument: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{argument}: {key!r} is a value, not a section")
    values[keys[-1]] = value
