"""`python -m edgevlm_export.nano build --out DIR` and `… evaluate`: the recipe from end to end."""

from pathlib import Path

import click


@click.group()
def main() -> None:
    """Build and measure nano, the built-in model."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New bundle.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".nano"), show_default=True,
    help="Where wheels and checkpoints stay between runs.",
)  # fmt: skip
@click.option("--threads", default=2, show_default=True, help="Threads for training.")
@click.option("--retrain/--no-retrain", default=True, help="Or reuse the cache's checkpoint.")
def build(out: Path, cache: Path, threads: int, retrain: bool) -> None:
    """Fetch the parts, train projector and adapters, write the files that are shipped."""
    import torch

    from . import adapter, assemble, language, observe, package, parts, tower, train
    from .projector import Projector

    torch.set_num_threads(threads)
    cache.mkdir(parents=True, exist_ok=True)
    files = [parts.fetch(part, cache) for part in (parts.CLASSIFIER, parts.FACES, parts.LANGUAGE)]
    classifier, centerface, gguf = files
    model, tokenizer = language.load(gguf)
    embeddings = language.embedding_table(model)
    config = model.config
    checkpoint = cache / "checkpoint.pt"
    if retrain:
        train.train(model, tokenizer, checkpoint)
    projector = Projector(embeddings, lambda text: tokenizer.encode(text).ids)
    learned = torch.load(checkpoint, weights_only=True)
    projector.load_state_dict(learned["projector"])
    observer = observe.Observer(tower.load(classifier))
    vision = assemble.vision_model(observer, projector.requires_grad_(False), centerface)
    out.mkdir(parents=True, exist_ok=True)
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    adapter.write(out / "adapter.gguf", learned["adapters"], heads, kv_heads)
    package.write(out, vision, gguf, tokenizer)
    click.echo(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")


@main.command()
@click.option("--model", default="nano", show_default=True, help="Name or bundle directory.")
@click.option(
    "--stamps", type=click.Path(path_type=Path, exists=True),
    default=Path("/usr/share/tuxpaint/stamps"), show_default=True,
    help="Of Debian's tuxpaint-stamps-default.",
)  # fmt: skip
@click.option(
    "--scenes", type=click.Path(path_type=Path, exists=True), required=True,
    help="Folder with the package photos that README.md lists.",
)  # fmt: skip
@click.option("--threads", default=1, show_default=True)
@click.option("--verbose", is_flag=True, help="Print every answer.")
def evaluate(model: str, stamps: Path, scenes: Path, threads: int, verbose: bool) -> None:
    """Count right answers on photos that nothing was trained on."""
    from . import evaluate as evaluation

    evaluation.run(model, {"stamps": stamps, "scenes": scenes}, threads, verbose)


if __name__ == "__main__":
    main()
