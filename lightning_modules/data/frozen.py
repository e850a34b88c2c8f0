"""What the fork server imports last: what it has by then is shared by all workers.

A worker's garbage collector would look at every object, and so copy the memory of all packages: a
quarter of a second at each start.
"""

import gc

__all__: list[str] = []

gc.freeze()
