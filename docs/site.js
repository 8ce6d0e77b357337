// wide tables scroll within themselves: the theme wraps them, and the keyboard must reach what scrolls
addEventListener("load", () => requestAnimationFrame(() => {
  for (const part of document.querySelectorAll(".md-typeset__scrollwrap")) {
    part.tabIndex = 0;
    part.setAttribute("role", "region");
    part.setAttribute("aria-label", "Table");
  }
}));
