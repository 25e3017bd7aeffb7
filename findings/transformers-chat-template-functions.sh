#!/usr/bin/env bash
# transformers 5.23.0: a function that is given to `apply_chat_template` as a template variable reaches the template as a
# text, not as a function. So `strftime_now`, which templates of Llama 3.2's kind call to print today's date, cannot be
# replaced by one of a fixed day that way: with it, the template fails ("'str' object is not callable"), although the
# same template renders without it. Variables that are data arrive as they are; a macro put before the template works.
#
# Seen: variable: given as a text
#       replaced strftime_now: TypeError
#       macro before the template: 26 Jul 2024
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/look.py" <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
chat = [{"role": "user", "content": "a"}]


def render(template: str, **variables: object) -> str:
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(chat, tokenize=False, **variables)


assert len(render("{{ strftime_now('%Y') }}")) == 4, "the template itself is fine"
assert render("{{ day }}", day="26 Jul 2024") == "26 Jul 2024", "and so are variables that are data"
kind = render("{{ 'a text' if f is string else 'a function' if f is callable else 'something else' }}", f=lambda _: "x")
print("variable: given as", kind)
try:
    replaced = render("{{ strftime_now('%d %b %Y') }}", strftime_now=lambda _: "26 Jul 2024")
except Exception as error:
    replaced = type(error).__name__
print("replaced strftime_now:", replaced)
macro = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
put_before = render(macro + "{{ strftime_now('%d %b %Y') }}")
print("macro before the template:", put_before)
assert (kind, replaced, put_before) == ("a text", "TypeError", "26 Jul 2024"), "this has changed"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
