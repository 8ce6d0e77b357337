// What of Observable Plot the pages draw with; `make vendor` bundles it into plot.min.js.
export { plot, rectY, ruleX, ruleY, lineY, lineX, dot, text, tip, pointer, pointerX, axisX, axisY, gridX, gridY, link } from "@observablehq/plot";
