"""The subcommands of ``attn``: each a module with ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""
