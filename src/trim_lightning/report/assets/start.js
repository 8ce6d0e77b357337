// Draws what the page has room for.
if (page === "report") {
  if (data.scores) chart("chart-scores", scoreChart);
  if (data.lengths) chart("chart-lengths", lengthChart);
  targets();
  candidates();
  records();
}
if (page === "explain") {
  const [item] = data.candidates.only;
  similarityRange([item]);
  $("only-view").append(...(item.view ? [matchView(item)] : turns(item, "")));
  targets();
}
if (page === "compare") {
  sorting();
  axisCharts();
  tradeoff();
  sides();
}
document.documentElement.dataset.ready = "true";
