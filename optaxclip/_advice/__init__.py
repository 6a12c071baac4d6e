"""What is wrong with a run, and which number do I type?

In reading order:
  diagnose: verdicts in plain words, worst first.
  explosions, not_finite: did the run end in NaN: was it the steps, or the batch?
  crashes: where is it not finite, and did somebody skip that?
  courses, oscillations, traction: where does a finite run go?
  spikes: which steps stand out, and did the loss follow?
  layers: which layers are dead or starved?
  weights: what became of the weights?
  clipping: how often does the clip act?
  run: one run as the rules see it, and the measures of its noise.
  asking: with what an optimizer is asked, and how it takes a step.
  probe: how far an optimizer moves the params, for each unit of the gradient.
  suggest: a threshold before the first step.

May import _looking and every wing below it.
"""
