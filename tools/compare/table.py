"""Markdown tables of a comparison."""

from statistics import median

COLUMNS = {
    "decode": ("krait:bf16:f32", "krait:bf16:bf16", "krait:f32:f32", "mamba_ssm", "llama.cpp:f16",
               "llama.cpp:q8_0", "llama.cpp:q4_0", "transformers"),
    "prefill": ("krait:bf16:f32", "krait:f32:f32", "mamba_ssm", "llama.cpp:f16", "llama.cpp:q8_0",
                "llama.cpp:q4_0", "transformers"),
    "generate": ("krait:bf16:f32", "mamba_ssm", "gpt-neox", "transformers"),
}
TITLES = {
    "decode": "Decode, tokens/s of all sequences together",
    "prefill": "Prefill, prompt tokens/s, batch 1",
    "generate": "Prompt and generation, generated tokens/s of all sequences together, the prompt's time included",
}
NAMES = {"krait:bf16:f32": "krait bf16", "krait:bf16:bf16": "krait bf16, bf16 state",
         "krait:f32:f32": "krait f32", "llama.cpp:f16": "llama.cpp f16", "llama.cpp:q8_0": "llama.cpp Q8_0",
         "llama.cpp:q4_0": "llama.cpp Q4_0", "gpt-neox": "Transformer (GPT-NeoX)"}


def rate(row):
    """Tokens/s of a row, or None."""
    if row.get("error") or not row.get("seconds"):
        return None
    tokens = row["batch"] * (row["n_gen"] if row["kind"] == "generate" else
                             row["n_prompt"] if row["kind"] == "prefill" else 1)
    return tokens / median(row["seconds"])


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def cell(row, reference):
    value = rate(row) if row else None
    if value is None:
        return "–"
    text = number(value)
    if row["system"].startswith("krait"):
        share = row.get("share_of_floor")
        return text + (f" ({100 * share:.0f}%)" if share else "")
    return text + (f" ({reference / value:.1f}x)" if reference else "")


def label(kind, test):
    if kind == "decode":
        return f"batch {test['batch']}"
    if kind == "prefill":
        return f"{test['n_prompt']}"
    return f"{test['n_prompt']} + {test['n_gen']}, batch {test['batch']}"


def tables(rows):
    """Markdown of all rows: one table for each kind that has any."""
    text = ""
    for kind, order in COLUMNS.items():
        mine = [r for r in rows if r["kind"] == kind]
        systems = [s for s in order if any(r["system"] == s and rate(r) for r in mine)]
        if not systems:
            continue
        by_test = {}
        for r in mine:
            key = (r["shape"], r["batch"], r["n_prompt"], r["n_gen"])
            by_test.setdefault(key, {})[r["system"]] = r
        heads = ["model", {"decode": "test", "prefill": "prompt", "generate": "test"}[kind]]
        heads += [NAMES.get(s, s) for s in systems]
        text += f"**{TITLES[kind]}**\n\n"
        text += "| " + " | ".join(heads) + " |\n"
        text += "| --- | --- |" + " ---: |" * len(systems) + "\n"
        for found in by_test.values():
            if not any(rate(r) for r in found.values()):
                continue
            reference = next((rate(found[s]) for s in order
                              if s.startswith("krait") and s in found and rate(found[s])), None)
            any_row = next(iter(found.values()))
            cells = [any_row["shape"], label(kind, any_row)]
            cells += [cell(found.get(s), reference) for s in systems]
            text += "| " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def least_leads(result):
    """One line: where krait leads each peer by least. It is krait with the peer's type of state that counts, where
    that was measured."""
    by_test, least = {}, {}
    for r in result["rows"]:
        key = (r["shape"], r["kind"], r["batch"], r["n_prompt"], r["n_gen"])
        by_test.setdefault(key, {})[r["system"]] = r
    for found in by_test.values():
        for system, r in found.items():
            state = result["systems"].get(system, {}).get("state", "f32")
            ours = [rate(found[s]) for s in (f"krait:bf16:{state}", "krait:bf16:f32") if s in found]
            ours = [v for v in ours if v]
            if system.startswith("krait") or not rate(r) or not ours:
                continue
            lead = (ours[0] / rate(r), f"{r['shape']}, {r['kind']}, {label(r['kind'], r)}")
            least[system] = min(lead, least.get(system, lead))
    if not least:
        return ""
    return ("Krait's least lead, with the peer's type of state where that was measured: " +
            "; ".join(f"{NAMES.get(s, s)} {lead:.2f}x ({where})" for s, (lead, where) in least.items()) + ".\n")


LEGEND = ("In brackets: krait's share of what the device allows (bytes and flops by count, at the ceilings "
          "measured in the same run); beside the others, how many times as fast krait's first column is.\n")


def report(result):
    """The whole Markdown page: where it was measured, tables, what is missing."""
    about = result["about"]
    text = f"{about['device']}"
    if about.get("driver"):
        text += f", driver {about['driver']}"
    if about.get("clocks"):
        text += f", {about['clocks']}"
    text += f"; {about['date']}.\n"
    versions = [f"{name} {info.get('version', '')}".strip()
                for name, info in sorted(result["systems"].items()) if "missing" not in info]
    text += "Systems: " + "; ".join(dict.fromkeys(versions)) + ".\n"
    ceilings = about.get("ceilings")
    if ceilings:
        text += (f"Ceilings: copy {ceilings['copy_gb_per_s']:,.0f} GB/s, read {ceilings['read_gb_per_s']:,.0f} "
                 f"GB/s, products {ceilings['product_tflop_per_s']:,.4g} TFLOP/s.\n")
    text += "\n" + tables(result["rows"]) + LEGEND + least_leads(result)
    missing = [f"- {name}: {info['missing']}" for name, info in sorted(result["systems"].items())
               if "missing" in info]
    errors = {}
    for r in result["rows"]:
        if r.get("error"):
            errors.setdefault((r["system"], r["shape"], r["error"]), []).append(label(r["kind"], r))
    missing += [f"- {system}, {shape}, {r'; '.join(which)}: {error}"
                for (system, shape, error), which in errors.items()]
    if missing:
        text += "\nNot measured:\n\n" + "\n".join(missing) + "\n"
    return text
