"""Grammars that would compile and then could not keep their word: recursion without end, keys that repeat.

llguidance refuses what it does not implement and most of what nothing can satisfy. Two things it lets
through are found here, before anything runs: a rule or definition that needs itself without end, so that a
row would follow it for ever, and `minProperties` over names that may repeat.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from lmjax.errors import UserError

_MAPS = ("properties", "patternProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")


def check_schema(schema: dict) -> None:
    """Refuses a JSON schema with a definition that has no finite instance, or with keys that cannot be counted.

    Args:
      schema: one that llguidance has compiled, so that its keywords hold what they must.

    Raises:
      UserError: see above; the sentence names the definition.

    >>> check_schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1})
    Traceback (most recent call last):
    lmjax.errors.UserError: no finite JSON satisfies '#' of this schema, which requires itself again without \
end; let it end with an anyOf, an optional property or no minItems
    """
    targets = {"#": schema}
    for part in _reachable(schema, targets):
        free = part.get("additionalProperties", True) is not False or part.get("patternProperties")
        needed, required = part.get("minProperties", 0), set(part.get("required", ()))
        if free and needed - len(required) > 1:
            raise UserError(
                f"minProperties {needed} cannot be kept where names are free, because a name may be said twice; "
                "list the names in properties and required, and set additionalProperties to false"
            )
    # A definition is finite if it has an instance that needs only definitions found finite before it.
    finite: set[str] = set()
    while found := {name for name in targets.keys() - finite if _is_finite(targets[name], targets, finite)}:
        finite |= found
    for name in reversed(targets):  # the whole, '#', is the last to blame
        if name not in finite:
            raise UserError(
                f"no finite JSON satisfies '{name}' of this schema, which requires itself again without end; "
                "let it end with an anyOf, an optional property or no minItems"
            )


def _reachable(schema: dict, targets: dict[str, Any]) -> Iterator[dict]:
    """The schema and those that it uses; adds what references point at to `targets`. Data (const, enum) is left out."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        waiting += [part[key] for key in _SINGLE if key in part]
        waiting += [within for key in _MAPS for within in part.get(key, {}).values()]
        waiting += [within for key in _LISTS for within in part.get(key, ())]
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in targets:
            target = _resolve(schema, reference)
            if target is not None:
                targets[reference] = target
                waiting.append(target)


def _resolve(schema: Any, reference: str) -> Any:
    """What '#/$defs/x' points at; None where it points elsewhere or nowhere, which llguidance judges."""
    if not reference.startswith("#") or reference[1:2] not in ("", "/"):
        return None
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and step.isdigit() and int(step) < len(schema):
            schema = schema[int(step)]
        elif isinstance(schema, dict) and step in schema:
            schema = schema[step]
        else:
            return None
    return schema


def _is_finite(schema: Any, targets: dict[str, Any], finite: set[str]) -> bool:
    if not isinstance(schema, dict):
        return schema is not False

    def ends(part: Any) -> bool:
        return _is_finite(part, targets, finite)

    if schema.get("$ref") in targets and schema["$ref"] not in finite:
        return False
    if not all(map(ends, schema.get("allOf") or [])):
        return False
    if not all(any(map(ends, schema[key])) for key in ("anyOf", "oneOf") if schema.get(key)):
        return False
    if "const" in schema or "enum" in schema:
        return True
    kinds = schema.get("type")
    if kinds in ("object", ["object"]):
        properties = schema.get("properties") or {}
        return all(ends(properties.get(name, True)) for name in schema.get("required") or [])
    if kinds in ("array", ["array"]):
        first, least = schema.get("prefixItems") or [], schema.get("minItems") or 0
        return all(map(ends, first[:least])) and (least <= len(first) or ends(schema.get("items", True)))
    return True


_HEAD = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:(?!:)", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*%(?:ignore|import|declare|override|extend|llguidance)\b", re.MULTILINE)
_TOKEN = re.compile(r"\s*(?:(->\s*\w+)|(\"LITERAL\"|[A-Za-z_]\w*)|([|()\[\]?*+])|(\{\d+(?:,\d*)?\}))")
_LITERAL = re.compile(r"//[^\n]*|#[^\n]*|(\"(?:\\.|[^\"\\\n])*\"i?|/(?:\\.|[^/\\\n])+/[imslux]*|<[^>\n]*>)")


def check_lark(grammar: str) -> None:
    """Refuses a Lark grammar with a rule that can never end. A rule this cannot read is taken to end.

    >>> check_lark('start: "a" start')
    Traceback (most recent call last):
    lmjax.errors.UserError: rule 'start' of the grammar can never end, because each of its alternatives needs \
a rule without end; give it an alternative that ends
    """
    # Strings may hold any sign, so they go first; comments go with them.
    text = _LITERAL.sub(lambda found: ' "LITERAL" ' if found[1] else " ", grammar)
    heads = list(_HEAD.finditer(text))
    bodies: dict[str, list[str] | None] = {}
    for head, following in zip(heads, [*heads[1:], None]):
        body = text[head.end() : following.start() if following else len(text)]
        body = _DIRECTIVE.split(body, maxsplit=1)[0]
        bodies[head[1]] = None if head[1] in bodies else _tokens(body)
    endless = {name for name, tokens in bodies.items() if tokens is not None}
    while found := {name for name in endless if _ends(list(reversed(bodies[name] or [])), endless)}:
        endless -= found
    if endless:
        name = next((name for name in bodies if name in endless and name in (bodies[name] or [])), min(endless))
        raise UserError(
            f"rule '{name}' of the grammar can never end, because each of its alternatives needs a rule "
            "without end; give it an alternative that ends"
        )


def _tokens(body: str) -> list[str] | None:
    """Names, literals, brackets and operators of a rule; None where it holds anything else."""
    tokens, at = [], 0
    body = body.rstrip()
    while at < len(body):
        found = _TOKEN.match(body, at)
        if found is None:
            return None
        at = found.end()
        if not found[1]:
            tokens.append(found[0].strip())
    return tokens


def _ends(tokens: list[str], endless: set[str]) -> bool:
    """Whether some alternative can be finished. Reads `tokens` from their back, up to a closing bracket."""
    some, this = False, True
    while tokens and (token := tokens.pop()) not in (")", "]"):
        if token == "|":
            some, this = some or this, True
            continue
        if token == "(":
            ends = _ends(tokens, endless)
        elif token == "[":
            _ends(tokens, endless)
            ends = True
        else:
            ends = token not in endless
        if tokens and (tokens[-1] in ("?", "*") or re.match(r"\{0\D", tokens[-1])):
            tokens.pop()
            ends = True
        this = this and ends
    return some or this
