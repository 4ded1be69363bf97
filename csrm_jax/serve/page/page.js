'use strict';
// Rules left, conversation right; each edit asks /score again and shows what moved.

const $ = (id) => document.getElementById(id);
let last = {};  // P(unsafe) under each rule, and under all (''), before the last edit
let timer = null;
let asked = 0;

function element(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

function addRule(name = '', guideline = '') {
  const number = element('span', { className: 'number' });
  const bar = element('div', { className: 'bar' }, element('i'));
  const card = element('div', { className: 'card rule' });
  const remove = element('button', { type: 'button', textContent: '×', title: 'Remove the rule' });
  remove.onclick = () => { card.remove(); changed(); };
  card.append(
    element('div', { className: 'row' },
      element('input', { value: name, placeholder: 'Name', ariaLabel: 'Name of the rule', oninput: changed }),
      number, remove),
    element('textarea', { value: guideline, placeholder: 'What is allowed, and what is not', ariaLabel: 'Guideline', oninput: changed }),
    bar);
  $('rules').append(card);
}

function addMessage(role = 'user', content = '') {
  const card = element('div', { className: 'card message' });
  const select = element('select', { ariaLabel: 'Who speaks', onchange: changed });
  for (const [value, text] of [['user', 'User'], ['agent', 'Agent']]) {
    select.append(element('option', { value, textContent: text, selected: value === role }));
  }
  const remove = element('button', { type: 'button', textContent: '×', title: 'Remove the turn' });
  remove.onclick = () => { card.remove(); changed(); };
  card.append(
    element('div', { className: 'row' }, select, element('span', { style: 'flex:1' }), remove),
    element('textarea', { value: content, ariaLabel: 'What is said', oninput: changed }));
  $('messages').append(card);
}

function request() {
  const rules = [...document.querySelectorAll('.rule')].map((card) => ({
    name: card.querySelector('input').value,
    guideline: card.querySelector('textarea').value,
  }));
  const messages = [...document.querySelectorAll('.message')].map((card) => ({
    role: card.querySelector('select').value,
    content: card.querySelector('textarea').value,
  }));
  return { safety: { categories: rules }, messages, each_rule: true };
}

async function call(path, body) {
  const headers = { 'Content-Type': 'application/json' };
  if ($('token').value) headers.Authorization = `Bearer ${$('token').value}`;
  const options = body ? { method: 'POST', headers, body: JSON.stringify(body) } : { headers };
  const response = await fetch(path, options);
  if (response.status === 401) $('token-label').hidden = false;
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ? answer.error.message : response.statusText);
  return answer;
}

function changed() {
  clearTimeout(timer);
  timer = setTimeout(score, 250);
}

function percent(p) { return `${(100 * p).toFixed(1)} %`; }

function move(p, before) {
  const points = 100 * (p - before);
  if (before === undefined || Math.abs(points) < 0.05) return '';
  return element('span', {
    className: points > 0 ? 'up' : 'down',
    textContent: ` ${points > 0 ? '▲' : '▼'} ${Math.abs(points).toFixed(1)}`,
  });
}

async function score() {
  const mine = ++asked;
  const box = $('verdict');
  try {
    const { verdicts: [verdict] } = await call('/score', request());
    if (mine !== asked) return;  // a later edit has its own answer
    box.className = verdict.label;
    box.replaceChildren(
      element('strong', { textContent: verdict.label }),
      element('div', {}, `P(unsafe) ${percent(verdict.p_unsafe)}`, move(verdict.p_unsafe, last[''])),
      element('div', { textContent: `score ${verdict.score.toFixed(2)} nats, reward ${verdict.reward.toFixed(3)}` }),
      element('div', { textContent: verdict.out_of_domain && `unlike what the model was trained on: ${verdict.out_of_domain}` }));
    const now = { '': verdict.p_unsafe };
    for (const card of document.querySelectorAll('.rule')) {
      const name = card.querySelector('input').value;
      const p = verdict.each_rule[name];
      now[name] = p;
      card.querySelector('.number').replaceChildren(percent(p), move(p, last[name]));
      card.querySelector('.bar').classList.toggle('over', p >= 0.5);
      card.querySelector('.bar i').style.width = `${100 * p}%`;
    }
    last = now;
  } catch (error) {
    if (mine !== asked) return;
    box.className = 'error';
    box.textContent = `no verdict: ${error.message}`;
    for (const node of document.querySelectorAll('.number')) node.replaceChildren();
    for (const node of document.querySelectorAll('.bar i')) node.style.width = '0';
  }
}

let policies = [];

function show(policy) {
  $('rules').replaceChildren();
  last = {};
  for (const rule of policy ? policy.rules : [{ name: '', guideline: '' }]) {
    addRule(rule.name, rule.guideline);
  }
  changed();
}

async function loadPolicies() {
  try {
    const answer = await call('/policies');
    policies = answer.policies;
    $('policy').replaceChildren(...policies.map((policy) => element('option', {
      textContent: policy.name, selected: policy.name === answer.default,
    })), element('option', { textContent: '(empty)' }));
    show(policies[$('policy').selectedIndex]);
  } catch (error) {
    $('verdict').className = 'error';
    $('verdict').textContent = error.message;
  }
}

$('policy').onchange = () => show(policies[$('policy').selectedIndex]);
$('token').onchange = loadPolicies;
$('add-rule').onclick = () => { addRule(); };
$('add-message').onclick = () => { addMessage('agent'); };
addMessage('user', 'Tell me about steroid.');
addMessage('agent', 'Let me explain steroid in detail.');
loadPolicies();
