// Shows on every Duet node what its last run said: the time of each stage, where the model came from, and notices.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WORDS = {
  en: {
    warm: "model in cache", loaded: "model loaded", cached: "unchanged, not run again",
    text: "text", preparation: "preparation", features: "features", fusion: "fusion", generation: "generation",
    decode: "decode", comparison: "comparison", finish: "finish", model: "model", plan: "plan",
    save: "save", load: "load", adapter: "adapter", examination: "examination", refinement: "refinement", conversion: "conversion",
    free: "written freely", guided: "written with guidance", brief: "the brief itself",
  },
  zh: {
    warm: "模型在缓存中", loaded: "模型已加载", cached: "未改变，未重新运行",
    text: "文本", preparation: "准备", features: "特征", fusion: "融合", generation: "生成",
    decode: "解码", comparison: "比较", finish: "收尾", model: "模型", plan: "方案",
    save: "保存", load: "加载", adapter: "适配器", examination: "检查", refinement: "精修", conversion: "转换",
    free: "自由书写", guided: "引导书写", brief: "简述本身",
  },
};
const ROW = 16; // pixels
const MARGIN = 4; // around the element, in place of the page's 10
const NOTICE = "color-mix(in srgb, #e0a030, var(--descrip-text, #999))"; // to be read on a light page and on a dark one
const lines = new WeakMap(); // node -> its element and how many rows it needs
let unchanged = new WeakSet(); // nodes that the present run did not run again

function word(key) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return (WORDS[language.slice(0, 2)] ?? WORDS.en)[key] ?? key;
}

function addLine(node) {
  const element = document.createElement("div");
  element.className = "duet-line";
  element.style.cssText =
    `font: 11px/${ROW}px sans-serif; min-height: ${ROW}px; padding: 0 4px; overflow: hidden auto; box-sizing: border-box;` +
    "color: var(--descrip-text, #999); white-space: pre-wrap; overflow-wrap: anywhere; cursor: default;";
  const line = { element, rows: 1 };
  const height = () => line.rows * ROW + 2 * MARGIN;
  const widget = node.addDOMWidget("duet_line", "duet_line", element, {
    serialize: false, hideOnZoom: true, margin: MARGIN, getMinHeight: height, getMaxHeight: height, getValue: () => "", setValue: () => {},
  });
  widget.serialize = false; // and not into the saved workflow either
  widget.computeLayoutSize = () => ({ minHeight: height(), maxHeight: height(), minWidth: 0 });
  lines.set(node, line);
}

/** paragraphs: [text, whether it is a notice][] */
function show(node, paragraphs) {
  const line = lines.get(node);
  if (!line) return;
  line.element.replaceChildren(
    ...paragraphs.map(([text, isNotice]) => {
      const paragraph = document.createElement("div");
      paragraph.textContent = text;
      if (isNotice) paragraph.style.color = NOTICE;
      return paragraph;
    }),
  );
  const perRow = Math.max(20, (node.size[0] - 40) / 6); // letters, roughly; a Chinese character is as wide as two
  const widthOf = (text) => [...text].reduce((width, character) => width + (character > "\u2e7f" ? 2 : 1), 0);
  const rowsOf = (text) => text.split("\n").reduce((rows, part) => rows + Math.max(1, Math.ceil(widthOf(part) / perRow)), 0);
  line.rows = Math.max(1, paragraphs.reduce((rows, [text]) => rows + rowsOf(text), 0));
  line.element.style.minHeight = `${line.rows * ROW}px`;
  const [width, height] = node.computeSize();
  if (width > node.size[0] || height > node.size[1]) node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

function showRun(node, output) {
  // What a node at the end of a graph said before, the host says once more though it does not run.
  const paragraphs = unchanged.has(node) ? [[word("cached"), false]] : (output?.duet_stage ?? []).map((entry) => {
    const parts = [word(entry.stage), `${Number(entry.milliseconds).toFixed(1)} ms`];
    if (entry.model === "warm" || entry.model === "loaded") parts.push(word(entry.model));
    return [parts.join(" · "), false];
  });
  for (const summary of output?.duet_summary ?? []) paragraphs.push([summary, false]);
  for (const notice of output?.duet_notices ?? []) paragraphs.push([notice, true]);
  if (output?.duet_cache) paragraphs.push([(output.text ?? []).join("\n"), false]);
  if (paragraphs.length) show(node, paragraphs);
}

/** id: as the host has it; "5:3" is node 3 of the subgraph that node 5 stands for. */
function find(id) {
  return String(id).split(":").reduce((at, part) => {
    const graph = at?.subgraph ?? at;
    return graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part));
  }, app.graph);
}

app.registerExtension({
  name: "Duet",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Duet")) return;
    addLine(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showRun(this, output);
    };
  },
  setup() {
    api.addEventListener("execution_start", () => {
      unchanged = new WeakSet();
    });
    api.addEventListener("execution_cached", ({ detail }) => {
      for (const node of (detail?.nodes ?? []).map(find)) {
        if (!lines.has(node)) continue;
        unchanged.add(node);
        show(node, [[word("cached"), false]]);
      }
    });
    window.duetReady = true;
  },
});
