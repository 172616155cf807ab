"""The subcommands of ``attn``: each a module with ``HELP``, ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""
