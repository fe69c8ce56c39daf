"""Render chat templates with transformers, for tests/golden/chat_test.cpp.

    pip install transformers jinja2
    python write_golden.py --templates tests/data/chat --out tests/data/golden/chat/rendered.jsonl

One line for each template and conversation: {"template", "messages", "add_generation_prompt",
"tools", "special_tokens"} and either "text" or "error", which is what raise_exception was called
with.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Write a function that adds two numbers."}
SYSTEM = {"role": "system", "content": "You are a careful programmer. "}
ASSISTANT = {"role": "assistant", "content": " def add(a, b):\n    return a + b\n"}
ODD = {"role": "user", "content": "  {{ braces }} {% and %} \"quotes\" <tags> & é 日本 \U0001f642\n\n"}
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"}

CONVERSATIONS = [
    ([USER], None), ([SYSTEM, USER], None), ([USER, ASSISTANT, ODD], None),
    ([SYSTEM, USER, ASSISTANT, ODD], None), ([ODD], None), ([USER, USER], None), ([ASSISTANT], None),
    ([USER], [TOOL]), ([USER, CALL, RESULT, ASSISTANT, ODD], [TOOL, TOOL]),
]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--templates", required=True)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    with open(a.out, "w", encoding="ascii") as out:
        for path in sorted(Path(a.templates).glob("*.jinja")):
            source = path.read_text(encoding="utf-8")
            for messages, tools in CONVERSATIONS:
                for prompt in (True, False):
                    case = {"template": path.name, "messages": messages, "add_generation_prompt": prompt,
                            "tools": tools, "special_tokens": TOKENS}
                    try:
                        rendered, _ = render_jinja_template(
                            conversations=[messages], tools=tools, documents=None, chat_template=source,
                            add_generation_prompt=prompt, **TOKENS)
                        case["text"] = rendered[0]
                    except jinja2.exceptions.UndefinedError as e:
                        case["undefined"] = str(e)
                    except jinja2.exceptions.TemplateError as e:
                        case["error"] = str(e)
                    out.write(json.dumps(case) + "\n")
    print("transformers", version("transformers"), "jinja2", version("jinja2"))


if __name__ == "__main__":
    main()
