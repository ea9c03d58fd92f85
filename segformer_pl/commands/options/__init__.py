"""The arguments of the commands, parsed without torch; one file each.

Every command's file has the function ``parse(arguments) -> Namespace``. ``parser.py`` holds the
parser, and the other files what several commands share.
"""
