"""Use of a finished network.

`predict` labels folders of images with a checkpoint or an artifact; `compress` writes smaller
files and measures what they lose.
"""
