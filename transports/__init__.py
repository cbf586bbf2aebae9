"""Bytes between parties that are known by their keys: handshake, records, sessions, channels, and what carries them.

No torch, no privacy, no names of parties.  Nothing is imported here, so that ``import splitsec.transports`` costs
nothing.  Start reading at ``handshake`` (who are you?), go on with ``record`` and ``session``, and end at ``iothread``,
which drives them.
"""
