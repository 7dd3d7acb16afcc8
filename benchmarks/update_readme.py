"""Puts the table of ``benchmarks/results/latest.json`` into the README, between the two marks."""

from __future__ import annotations

from pathlib import Path

from dwarfstar_engine.bench.report import from_json, markdown

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- bench: made by benchmarks/update_readme.py -->\n"
END = "<!-- bench: end -->\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"README.md has lost its marks: put back {BEGIN.strip()} and {END.strip()}")
    report = from_json((ROOT / "benchmarks" / "results" / "latest.json").read_text("utf-8"))
    readme.write_text(f"{before}{BEGIN}\n{markdown(report)}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
