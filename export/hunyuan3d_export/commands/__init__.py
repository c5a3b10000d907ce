"""The command `hunyuan3d-export`, with a file for each group of subcommands, and the demo."""
