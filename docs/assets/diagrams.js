/* Draws the Mermaid diagrams of a page, in the colours of the scheme, anew when that is switched.

Mermaid (MIT licence, mermaid/LICENSE) is 2.5 MB, so it is loaded only by pages that have a diagram, from beside this
file: it is the npm package @mermaid-js/tiny 11.17.2, unchanged. */
"use strict";
(() => {
  const here = document.currentScript.src;
  const sources = new Map();
  let drawn = 0;

  function load() {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL("mermaid/mermaid.tiny.js", here);
      script.onload = resolve;
      script.onerror = () => reject(new Error(`cannot load ${script.src}`));
      document.head.append(script);
    });
  }

  async function draw() {
    const style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(name).trim();
    mermaid.initialize({
      startOnLoad: false,
      theme: "base",
      fontFamily: style.fontFamily,
      sequence: { useMaxWidth: true, mirrorActors: false },
      flowchart: { useMaxWidth: true, curve: "basis" },
      themeVariables: {
        fontFamily: style.fontFamily,
        fontSize: "15px",
        darkMode: document.body.dataset.mdColorScheme === "slate",
        background: colour("--diagram-ground"),
        primaryColor: colour("--diagram-fill"),
        primaryTextColor: colour("--diagram-text"),
        primaryBorderColor: colour("--diagram-line"),
        secondaryColor: colour("--diagram-fill-2"),
        tertiaryColor: colour("--diagram-group"),
        tertiaryTextColor: colour("--diagram-text"),
        tertiaryBorderColor: colour("--diagram-group-line"),
        lineColor: colour("--diagram-line"),
        textColor: colour("--diagram-text"),
        clusterBkg: colour("--diagram-group"),
        clusterBorder: colour("--diagram-group-line"),
        edgeLabelBackground: colour("--diagram-ground"),
        noteBkgColor: colour("--diagram-fill-2"),
        noteTextColor: colour("--diagram-text"),
        noteBorderColor: colour("--diagram-line"),
        activationBkgColor: colour("--diagram-fill-2"),
        activationBorderColor: colour("--diagram-line"),
      },
    });
    for (const [place, source] of sources) {
      drawn += 1;
      const { svg } = await mermaid.render(`diagram-${drawn}`, source);
      place.innerHTML = svg;
      place.style.setProperty("--natural", place.firstElementChild.style.maxWidth);
      place.dataset.drawn = "yes";
    }
  }

  async function main() {
    for (const block of document.querySelectorAll("pre.diagram")) {
      const place = document.createElement("div");
      place.className = "diagram";
      sources.set(place, block.textContent);
      block.replaceWith(place);
    }
    if (sources.size === 0) return;
    await load();
    await document.fonts.ready; // the boxes are measured
    let last = Promise.resolve();
    const again = () => (last = last.then(draw));
    await again();
    new MutationObserver(again).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  }

  main();
})();
