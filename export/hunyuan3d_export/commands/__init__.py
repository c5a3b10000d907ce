"""The command `hunyuan3d-export`, a file for each group of subcommands, and the demo."""
