"""The subcommands of `hunyuan3d`, with a file for each group, and what they share."""
