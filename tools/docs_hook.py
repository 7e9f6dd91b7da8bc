"""mkdocs hook: write the settings page from the option classes when the documentation is built."""

from __future__ import annotations

from itertools import groupby

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from headrace.cli.settings import GROUPS, Setting, all_settings

INTRODUCTION = """# Settings

Every setting, once. The same name is a flag of `headrace run` or `headrace serve` (`--max-tokens 64`), a line of the
TOML file given with `--config` (`max_tokens = 64`), and, for the settings of the model, a keyword of `LLM`
(`LLM(step_tokens=512)`). A flag wins over the file, the file over the default. Nothing is read from the environment.
"""
MEANINGS = {
    "Model": "How the model is loaded and run.",
    "Sampling": "How outputs are drawn where a row does not say so itself.",
    "Run": "What `headrace run` reads, asks and writes.",
    "Serve": "How `headrace serve` answers. It takes the settings of the model and of sampling, too.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/settings.md", content=write_page()))
    return files


def write_page() -> str:
    """The page's Markdown: a table for each group of settings."""
    parts = [INTRODUCTION]
    for group, settings in groupby(all_settings(tuple(GROUPS)), key=lambda setting: setting.group):
        rows = "\n".join(write_row(setting) for setting in settings)
        parts.append(
            f"## {group}\n\n{MEANINGS[group]}\n\n| Setting | Value | Default | Meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def write_row(setting: Setting) -> str:
    value = ", ".join(f"`{choice}`" for choice in setting.choices) or setting.metavar or "yes or no"
    default = f"`{setting.default_text}`" if setting.default_text else "none"
    meaning = setting.meaning.replace("{{", "&#123;&#123;")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{setting.name}`", value, default, meaning)) + " |"
