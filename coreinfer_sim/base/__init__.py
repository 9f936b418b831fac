"""Gives every room what it needs: checked settings, errors, files, memory, processes, progress, plots, and rows."""

__all__ = [
    "analysis_settings",
    "chats",
    "corpus_files",
    "decode_settings",
    "errors",
    "extra",
    "files",
    "hub",
    "memory",
    "plain",
    "plots",
    "processes",
    "processor",
    "progress",
    "resuming",
    "ray_tasks",
    "rows",
    "scale_settings",
    "settings",
    "stores",
]
