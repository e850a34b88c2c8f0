"""Write shards of four images, a tenth of a second each: slow_shards.py SRC DST."""

import sys
import time

from lightning_modules.data.shards import writer

write = writer._write


def write_slowly(*arguments):
    time.sleep(0.1)
    write(*arguments)


writer._write = write_slowly
writer.make_shards(*sys.argv[1:], images_per_shard=4)
