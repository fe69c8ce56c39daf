"""Write what can be computed of a model card: tables, samples, loss curve, attributions.

    python card.py --model models/hognose --storybooks storybooks-ccby.tsv --books books.tsv \\
        [--krait build/cpu-release/krait]

README.md of the model folder keeps its prose; the text between <!-- NAME --> and <!-- /NAME -->
is replaced for NAME in figures, trials, samples. Reads MODEL/training/*.json*.
"""

import argparse
import csv
import json
import re
import subprocess
from pathlib import Path

PROMPTS = ["", "", "", "", "",
           "The old house stood at the end of the lane,",
           "\"I have never seen such a thing,\" said",
           "Once upon a time there was a young",
           "It was raining when the ship",
           "The king sent for his three sons and told them"]


def figures(folder):
    rows = ["| text | bytes per token | bits per byte | perplexity per token | windows of 512 | whole documents |",
            "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, by in json.loads((folder / "training/figures.json").read_text()).items():
        main = by["windows of 2048"]
        bits_per_token = main["nats_per_token"] / 0.6931471805599453
        whole = by.get("whole documents", {}).get("bits_per_byte")
        rows.append(f"| {name} | {bits_per_token / main['bits_per_byte']:.2f} "
                    f"| **{main['bits_per_byte']:.3f}** | {main['perplexity']:.1f} "
                    f"| {by['windows of 512']['bits_per_byte']:.3f} "
                    f"| {f'{whole:.3f}' if whole else ''} |")
    return "\n".join(rows)


def trials(folder):
    rows = ["| tokenizer | d_model | layers | parameters | MB | peak lr | bits per byte | tokens/s | s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for t in json.loads((folder / "training/trials.json").read_text()):
        rows.append(f"| {t['tokenizer']} | {t['d_model']} | {t['n_layer']} | {t['parameters']:,} "
                    f"| {2e-6 * t['parameters']:.1f} | {t['lr']:g} | {t['bits_per_byte']:.4f} "
                    f"| {t['tokens_per_s']:,} | {t['seconds']:.0f} |")
    return "\n".join(rows)


def samples(folder, krait, tokens=200):
    """One sample per prompt, seed = number of the prompt, none left out."""
    def text(prompt, seed):
        if krait:
            done = subprocess.run([krait, "run", "-m", str(folder), "-p", prompt, "-n", str(tokens),
                                   "-s", str(seed), "--device", "cpu", "-q"],
                                  capture_output=True, text=True, check=True)
            return done.stdout
        return generate(model, tokenizer, prompt, tokens, seed, **sampling)

    if not krait:
        import sentencepiece
        from evaluate import generate, sampling_defaults
        from model import load_folder
        model, sampling = load_folder(folder, "plain"), sampling_defaults(folder)
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    out = []
    for seed, prompt in enumerate(PROMPTS, 1):
        body = text(prompt, seed).strip()
        if prompt and body.startswith(prompt):
            body = f"**{prompt}**{body[len(prompt):]}"
        elif prompt:
            body = f"**{prompt}** {body}"
        quoted = "\n".join(f"> {line}".rstrip() for line in body.split("\n"))
        out.append(f"Seed {seed}, {'prompt in bold' if prompt else 'no prompt'}:\n\n{quoted}")
    return "\n\n".join(out)


def loss_curve(folder, bytes_per_token):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4))
    for path, style, label in ((folder / "training/log.jsonl", "-", "weight decay 0.5 (kept)"),
                               (folder / "training/log-weight-decay-0.1.jsonl", "--", "0.1")):
        log = [json.loads(line) for line in path.read_text().splitlines()]
        epochs = [x["epoch"] for x in log]
        axis.plot(epochs, [x["valid_bits_per_byte"] for x in log], "C0" + style,
                  label=f"books.valid, {label}")
        # The training loss is nats per token; the bytes of a token make it comparable.
        axis.plot(epochs, [x["train_loss"] / 0.693147 / bytes_per_token for x in log], "C1" + style,
                  label=f"training with dropout, {label}")
    axis.set_xlabel("epochs")
    axis.set_ylabel("bits per byte")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "krait"
    figure.savefig(folder / "loss.svg", metadata={"Date": None})


def attribution(storybooks, books):
    lines = ["# Texts the model was trained and measured on", "",
             "## Children's storybooks, CC BY", "",
             "African Storybook Project and Pratham Books StoryWeaver, through the repositories named under",
             "source (global-asp/asp-source at 99e022369a980bd52bce8c6f86d5f24e9a4ada9d, global-asp/pb-source at",
             "9ea530dfb0011dd1cbaf42e6ffe74aa3ef5733ed). Changes: lines re-joined, quotes made plain, licence",
             "footer removed. The sources mark each story CC-BY without a version: https://creativecommons.org/licenses/by/4.0/",
             "", "| split | collection | title | text | translation | illustration | licence | source |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]

    def cells(row, names):
        return "| " + " | ".join((row[n] or "").replace("|", "\\|") for n in names) + " |"

    with open(storybooks, newline="", encoding="utf-8") as f:
        lines += [cells(r, r.keys()) for r in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    lines += ["", "## TinyStories (a sample), CDLA-Sharing-1.0", "",
              "Ronen Eldan, Yuanzhi Li, 2023; https://cdla.dev/sharing-1-0/; taken from s-ajaykumar/smallGPT,",
              "`data/tiny_stories.txt`, b8b899265a5574abd2c19d8857039309184a357c.", "",
              "## Books, public domain, editions by Standard Ebooks (CC0-1.0)", "",
              "pd: author dead before 1956; uspd: in the public domain in the United States, perhaps not elsewhere;",
              "split train or valid, and one title that was only used to measure.", "",
              "| split | status | title | author | repository | commit |", "| --- | --- | --- | --- | --- | --- |"]
    with open(books, newline="", encoding="utf-8") as f:
        names = ("split", "status", "title", "author", "repository", "commit")
        lines += [cells(r, names) for r in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--storybooks", help="storybooks-ccby.tsv; rewrites ATTRIBUTION.md with --books")
    p.add_argument("--books")
    p.add_argument("--bytes-per-token", type=float, default=3.8, help="of the training text")
    p.add_argument("--krait", help="take the samples from this program instead of PyTorch")
    p.add_argument("--no-samples", action="store_true")
    a = p.parse_args()
    folder = Path(a.model)
    parts = {"figures": figures(folder), "trials": trials(folder)}
    if not a.no_samples:
        parts["samples"] = samples(folder, a.krait)
    card = (folder / "README.md").read_text()
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(card):
            raise SystemExit(f"{folder}/README.md has no <!-- {name} --> … <!-- /{name} -->")
        card = pattern.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", card)
    (folder / "README.md").write_text(card)
    loss_curve(folder, a.bytes_per_token)
    if a.storybooks and a.books:
        (folder / "ATTRIBUTION.md").write_text(attribution(a.storybooks, a.books))


if __name__ == "__main__":
    main()
