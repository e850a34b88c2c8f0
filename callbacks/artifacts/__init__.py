"""The artifact at every validation: a queue of exports, and the folder that they are published in."""
