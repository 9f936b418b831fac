// Marks the words in which two answers differ.

const MOST_WORDS = 3000;

/** Return the places of `a` and `b` that are in a longest common subsequence. */
function common(a, b) {
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const here = i * width + j;
      lengths[here] = a[i] === b[j] ? lengths[here + width + 1] + 1 : Math.max(lengths[here + width], lengths[here + 1]);
    }
  }
  const [inA, inB] = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      inA.add(i++);
      inB.add(j++);
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

/** Return the words of an element, each with the text node that it stands in. Formulas and buttons hold none. */
function words(root) {
  const found = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT, node =>
    node.parentElement.closest(".formula, .spanned, .head") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
  while (walker.nextNode()) {
    for (const match of walker.currentNode.data.matchAll(/\S+/g)) {
      found.push({node: walker.currentNode, begin: match.index, end: match.index + match[0].length, text: match[0]});
    }
  }
  return found;
}

function markAll(found, same) {
  for (let i = found.length - 1; i >= 0; i -= 1) {  // from behind, so that places before it stay right
    if (same.has(i)) continue;
    const range = document.createRange();
    range.setStart(found[i].node, found[i].begin);
    range.setEnd(found[i].node, found[i].end);
    range.surroundContents(document.createElement("mark"));
  }
}

/** Mark what differs in both elements; return how many words do, and how many there are. */
export function markDifferences(a, b) {
  for (const old of [...a.querySelectorAll("mark"), ...b.querySelectorAll("mark")]) old.replaceWith(...old.childNodes);
  a.normalize();
  b.normalize();
  const [inA, inB] = [words(a), words(b)];
  if (inA.length > MOST_WORDS || inB.length > MOST_WORDS) return null;
  const [sameA, sameB] = common(inA.map(each => each.text), inB.map(each => each.text));
  markAll(inA, sameA);
  markAll(inB, sameB);
  return {differ: inA.length - sameA.size + inB.length - sameB.size, words: inA.length + inB.length};
}
