"""Write the answers of transformers on a real passage, for tests/golden/hognose_test.cpp.

    python write_golden.py --model models/hognose --text passage.txt --out expected.safetensors

float32 on the CPU. Tensors: ids int64 [L] (the text after <|endoftext|>), positions int64 [8] and
logits float32 [8, V] at them, nats float32 [1] (mean negative log-likelihood of ids[1:]), greedy
int64 [48] (the greedy continuation of the first 64 ids).
"""

import argparse
from pathlib import Path

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--text", required=True)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(a.model) / "tokenizer.model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model).float().eval()
    ids = torch.tensor([sp.eos_id()] + sp.encode(Path(a.text).read_text(encoding="utf-8")))
    logits = model(ids[None], use_cache=False).logits[0]                     # [L,V]
    positions = torch.linspace(0, len(ids) - 1, 8).long()
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    # Not generate(): it would apply the sampling defaults of generation_config.json.
    greedy = ids[:64]
    for _ in range(48):
        last = model(greedy[None], use_cache=False).logits[0, -1]
        greedy = torch.cat([greedy, last.argmax()[None]])
    save_file({"ids": ids, "positions": positions, "logits": logits[positions].contiguous(),
               "nats": nats[None], "greedy": greedy[64:].contiguous()},
              a.out, metadata={"transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
