"""The commands besides ``fit``, ``validate``, ``test`` and ``doctor``; one file each.

A command is two modules: ``options/NAME.py`` parses its arguments without torch, so that ``--help``
and mistakes are answered at once, and ``NAME.py`` runs it with these options. ``networks.py`` and
``device.py`` are shared by the commands, and ``validation_split.py`` by those that evaluate many
settings.
"""
