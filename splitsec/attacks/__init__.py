"""Attacks that run: parties that speak the real protocol over the real channel and mean it harm.

Here: nothing but the package.  ``catalogue`` lists what there is, ``arena`` runs honest parties beside an attacking
one, ``adversary`` is the attacking party's process, ``strategy`` what such a party does; then one file for each attack.
Not here: what notices them (``splitsec.detectors``).
"""
