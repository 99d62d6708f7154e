"""`moka chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
import typer

from .common import AdapterOption, DtypeOption, ModelOption, QuantizeOption, load
from .console import err

HELP = "/reset forgets the conversation, /exit or end of input leaves"


def chat(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "auto",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue the text as it is: no chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to a model; also reads questions from a pipe, one per line."""
    from transformers import TextStreamer

    loaded, tokenizer = load(model, adapter, quantize, dtype)
    torch.manual_seed(seed)
    plain = plain or not tokenizer.chat_template
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    err.print(f"{loaded.name_or_path}: {HELP}", highlight=False)
    while (line := _read()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            history = list(start)
        elif line:
            history.append({"role": "user", "content": line})
            prompt = line if plain else history
            answer = _answer(loaded, tokenizer, prompt, streamer, max_new_tokens, temperature)
            history.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    """A line of input, or None at its end."""
    if sys.stdin.isatty():
        err.print("[bold green]you>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    model: Any, tokenizer: Any, prompt: Any, streamer: Any, max_new_tokens: int, temperature: float
) -> str:
    """Generates and prints the answer to a text or to a list of messages."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            **sampling,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
