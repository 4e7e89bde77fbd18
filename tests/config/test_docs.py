"""docs/config.md lists the table of keys; ``python tests/config/test_docs.py`` writes the lists anew."""

from __future__ import annotations

from pathlib import Path

from tierflow.config_keys import KEYS, Key, Role

PAGE = Path(__file__).parents[2] / "docs/config.md"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def honoured(key: Key) -> str:
    return f"| `{key.path}` | {cell(key.expect)} | {key.default} | {key.unit} | {cell(key.note)} |"


def rows(role: Role) -> list[str]:
    keys = [key for key in KEYS.values() if key.role is role]
    if role is Role.HONOURED:
        head = ["| key | accepts | default | unit | remarks |", "| --- | --- | --- | --- | --- |"]
        return head + [honoured(key) for key in keys]
    if role is Role.REFUSED:
        return ["| key | why, and what to do |", "| --- | --- |", *[f"| `{k.path}` | {cell(k.note)} |" for k in keys]]
    reasons: dict[str, list[str]] = {}
    for key in keys:
        reasons.setdefault(key.note, []).append(f"`{key.path}`")
    lines = [f"| {', '.join(names)} | {cell(reason)} |" for reason, names in reasons.items()]
    return ["| keys | why |", "| --- | --- |", *lines]


def with_tables(page: str) -> str:
    for role in Role:
        start, end = f"<!-- {role.value} -->\n", f"<!-- end {role.value} -->"
        before, _, rest = page.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"docs/config.md has no place for the {role.value} keys"
        page = before + start + "\n".join(rows(role)) + "\n" + end + after
    return page


def test_the_page_lists_every_key_with_its_class_default_and_unit() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run python tests/config/test_docs.py"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
