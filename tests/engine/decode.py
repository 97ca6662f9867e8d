"""Decodes every image in a directory with CRIU's own library, and names those that it can't read."""
import os
import sys

import pycriu

OURS = {"stasis.img"}  # CRIU ignores it
bad = []
directory = sys.argv[1]
for name in sorted(os.listdir(directory)):
    path = os.path.join(directory, name)
    if not name.endswith(".img") or name.startswith("pages-") or name in OURS or os.path.islink(path):
        continue
    if name.endswith(".gz.img"):
        continue  # tmpfs contents: a plain gzip'ed tar
    if name.startswith(("ifaddr-", "route-", "route6-", "rule-", "netns-ct-")):
        continue  # what iproute2 saves
    with open(path, "rb") as image:
        try:
            pycriu.images.load(image, pretty=False)
        except Exception as error:  # any failure to decode is what we look for
            bad.append(f"{name}: {type(error).__name__}: {error}")
if bad:
    sys.exit("\n".join(bad))
