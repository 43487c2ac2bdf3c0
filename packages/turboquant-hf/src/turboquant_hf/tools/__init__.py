"""The subcommands of `turboquant`; the extra `tools` brings what they need beside the cache."""
