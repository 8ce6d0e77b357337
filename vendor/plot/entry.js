export { plot, rectY, ruleX, ruleY, lineY, link, dot, text, tip, pointer, pointerX } from "@observablehq/plot";
