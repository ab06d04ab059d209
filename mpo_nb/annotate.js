// The annotation page of mpo_nb.human: draws what the kernel says, sends what was pressed.
// Texts are somebody else's: they go in as textContent only.
const SILENCE = 'No answer from the kernel yet: it is busy, or it was stopped (then run this cell again). ' +
  'The vote counts when the next pair appears.';

const element = (tag, name, parent, text) => {
  const e = document.createElement(tag);
  e.className = name;
  if (text !== undefined) e.textContent = text;
  parent.append(e);
  return e;
};

function render({ model, el }) {
  const root = element('div', 'mpo-vote', el);
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = 'true';
  const bar = element('progress', 'bar', root), status = element('div', 'status', root);
  status.setAttribute('aria-live', 'polite');
  const question = element('div', 'question', root), prompt = element('div', 'text prompt', root);
  const sides = element('div', 'sides', root);
  const [left, right] = ['Left', 'Right'].map(side => {
    const box = element('section', 'side', sides);
    element('h4', 'name', box, side);
    return element('div', 'text answer', box);
  });
  const buttons = element('div', 'buttons', root);
  const comment = element('input', 'comment', root);
  comment.placeholder = 'why? (optional; Enter or Esc goes back to the keys)';
  element('div', 'hint', root, 'click here, then use the keys');
  let waiting = null;

  const send = action => {
    const view = model.get('view');
    if (waiting || !view.offered.includes(action)) return;
    root.classList.add('waiting');
    waiting = setTimeout(() => { status.textContent = SILENCE; }, 3000);
    model.send({ action, turn: view.turn, comment: comment.value });
    root.focus({ preventScroll: true });
  };
  const all = model.get('actions').map(([action, label, keys]) => {
    const button = element('button', action.replace(' ', '-'), buttons, label + ' ');
    element('kbd', '', button, keys[0].replace('ArrowLeft', '←').replace('ArrowRight', '→'));
    button.setAttribute('aria-keyshortcuts', keys.join(' '));
    button.addEventListener('click', () => send(action));
    return { action, keys, button };
  });
  root.addEventListener('keydown', event => {
    if (event.target === comment) {
      if (event.key === 'Escape' || event.key === 'Enter') root.focus();
      return;
    }
    const hit = all.find(a => a.keys.includes(event.key.length === 1 ? event.key.toLowerCase() : event.key));
    if (!hit || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat) send(hit.action);
  });

  const draw = () => {
    const view = model.get('view');
    clearTimeout(waiting);
    waiting = null;
    root.classList.remove('waiting');
    root.classList.toggle('finished', view.finished);
    bar.max = view.total;
    bar.value = view.done;
    status.textContent = `${view.done} of ${view.total}` + (view.skipped ? `, ${view.skipped} skipped` : '') +
      (view.note ? ` · ${view.note}` : '');
    status.classList.toggle('error', view.error);
    question.textContent = view.question;
    prompt.textContent = view.prompt.trim();
    left.textContent = view.left.trim();
    right.textContent = view.right.trim();
    for (const text of [prompt, left, right]) text.scrollTop = 0;
    if (!view.error) comment.value = '';
    for (const { action, button } of all) button.hidden = !view.offered.includes(action);
  };
  model.on('change:view', draw);
  draw();
  return () => { clearTimeout(waiting); model.off('change:view', draw); };
}

export default { render };
