"""What a person looks at after a run.

`callback.Report` draws curves and sample predictions at every validation and the confusion matrix
of a test; `figures` draws, `worst_images` finds the images with the highest loss.
"""
