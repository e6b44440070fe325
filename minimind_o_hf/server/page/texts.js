// What the page says, in English and Chinese. `{name}` in a text is filled in.

const TEXTS = {
  en: {
    otherLanguage: "中文",
    otherLanguageLabel: "Show the page in Chinese",
    voice: "Voice",
    defaultVoice: "default",
    model: "Model",
    cloneVoice: "Clone a voice",
    newConversation: "New conversation",
    conversation: "Conversation",
    welcome: "Talk to MiniMind-O",
    welcomeText: "Type, hold the microphone, show a picture, or call. It answers in text and aloud.",
    message: "Message",
    messageHint: "Message MiniMind-O",
    addPicture: "Add a picture",
    takePicture: "Take a picture",
    removePicture: "Remove the picture",
    attachedPicture: "Attached picture",
    handsFree: "Hands free: the microphone stays open",
    mute: "Mute",
    volume: "Volume",
    call: "Call (hands free, full screen)",
    callTitle: "Call",
    talk: "Talk: hold, or press to start and again to send",
    stop: "Stop the answer",
    send: "Send",
    mayBeWrong: "Answers and voices are made by a model. They can be wrong.",
    close: "Close",
    you: "You",
    answer: "MiniMind-O",
    spoken: "Spoken, {seconds} s",
    recordingNow: "Recording {seconds} s. Release or press again to send, Escape to discard",
    firstSound: "First sound after {seconds} s",
    interrupted: "interrupted after {seconds} s",
    stopped: "stopped",
    limit: "cut off at the longest answer",
    newConnection: "The conversation starts anew here",
    connecting: "Connecting",
    online: "Connected",
    waiting: "Reconnecting",
    locked: "API key needed",
    ended: "Ended",
    retryNow: "Try now",
    dismiss: "Dismiss",
    keptText: "Not connected yet. Your message is kept: send it once the connection is back.",
    unreachable: "The server does not answer. Trying again.",
    offline: "This device is offline.",
    busy: "The server is busy: too many people are talking. Trying again.",
    refused: "The server refused the conversation. Trying again.",
    lost: "The connection broke. Connecting again.",
    endedText: "The server ended the conversation. Whatever you send next starts a new one.",
    endedWhy: "The server ended the conversation: {reason}",
    failed: "The answer failed: {message}",
    serverSays: "The server says: {message}",
    tapForSound: "The browser holds the sound back until you click or press a key on this page.",
    insecure:
      "This page is not secure (http from another machine), so the browser gives it no microphone, camera or loudspeaker: answers " +
      "come as text. Start the server with --https and open its https address.",
    noMediaDevices: "This browser gives no access to microphone and camera.",
    microphoneDenied: "The microphone is not allowed. Allow it in the browser's settings for this page, then try again.",
    microphoneMissing: "No microphone was found. Plug one in, or type.",
    microphoneBusy: "The microphone is used by another program.",
    microphoneFailed: "The microphone could not be opened.",
    microphoneLost: "The microphone was unplugged or taken away.",
    microphoneSilent: "The microphone gives no sound. Is it muted?",
    tooShort: "Too short. Hold the button while you speak.",
    cameraDenied: "The camera is not allowed. Allow it in the browser's settings for this page, then try again.",
    cameraMissing: "No camera was found. Choose a picture file instead.",
    cameraBusy: "The camera is used by another program.",
    cameraFailed: "The camera could not be opened.",
    badPicture: "The browser cannot read this picture.",
    take: "Take",
    turnCamera: "Other camera",
    keyTitle: "This server wants an API key",
    key: "API key",
    keyKept: "Kept until this tab is closed.",
    missingKey: "",
    wrongKey: "The server does not accept this key.",
    connect: "Connect",
    listening: "Listening",
    hearing: "You are speaking",
    thinking: "Thinking",
    speaking: "Speaking. You may interrupt.",
    microphoneMuted: "Microphone muted",
    muteMicrophone: "Mute the microphone",
    hangUp: "Hang up",
    captions: "Captions",
    recordingStep: "1. Recording",
    recordingText: "About half a minute of one person, in a quiet room, without music. You may read this aloud:",
    passage:
      "On Sunday we walked along the river until the rain began. A small boat went by, and somebody waved to us. " +
      "We waited under the old bridge, shared an apple and talked about the summer. What would you do with a whole free week? " +
      "I would sleep late, bake bread, and read the thick blue book that has been lying on my shelf for years.",
    record: "Record",
    stopRecording: "Stop recording",
    chooseFile: "Choose a file",
    level: "Level of the microphone",
    tooQuiet: "Too quiet: come closer to the microphone.",
    clipped: "Too loud: the recording is clipped. Move away a little and record again.",
    noisy: "There is noise: find a quieter place, and pause between sentences.",
    moreSpeech: "Good so far. Keep talking, {seconds} s more is better.",
    tooShortVoice: "Too short: at least {seconds} s are needed.",
    goodRecording: "A good recording.",
    unreadRecording: "The browser cannot read this file; the server may.",
    consentStep: "2. Consent",
    consentText: "A voice belongs to the person who speaks. Say who it is, and that they agree. The sentence is kept with the voice.",
    consent: "Consent",
    acceptSentence: "It is my own voice: accept “{sentence}”",
    sentence: "I am the speaker, and I agree that my voice is cloned on this server.",
    nameStep: "3. Name",
    name: "Name",
    makeVoice: "Make the voice",
    makingVoice: "Making the voice …",
    noRecording: "Record something first, or choose a file.",
    stillRecording: "Stop the recording first.",
    noName: "Give the voice a name.",
    noConsent: "The consent has to be a sentence of at least 10 characters.",
    madeVoice: "The voice {name} was made and is chosen.",
    ownVoices: "Voices made on this server",
    delete: "Delete",
    deleteVoice: "Delete the voice {name}",
    reallyDelete: "Really delete?",
    deletedVoice: "The voice {name} was deleted.",
  },
  zh: {
    otherLanguage: "English",
    otherLanguageLabel: "用英文显示页面",
    voice: "声音",
    defaultVoice: "默认",
    model: "模型",
    cloneVoice: "克隆声音",
    newConversation: "新对话",
    conversation: "对话",
    welcome: "和 MiniMind-O 聊聊",
    welcomeText: "打字、按住麦克风说话、发一张图片，或者直接通话。它会用文字和声音回答。",
    message: "消息",
    messageHint: "给 MiniMind-O 发消息",
    addPicture: "添加图片",
    takePicture: "拍照",
    removePicture: "移除图片",
    attachedPicture: "已添加的图片",
    handsFree: "免提：麦克风保持打开",
    mute: "静音",
    volume: "音量",
    call: "通话（免提、全屏）",
    callTitle: "通话",
    talk: "说话：按住，或按一下开始、再按一下发送",
    stop: "停止回答",
    send: "发送",
    mayBeWrong: "回答和声音由模型生成，可能有误。",
    close: "关闭",
    you: "你",
    answer: "MiniMind-O",
    spoken: "语音，{seconds} 秒",
    recordingNow: "正在录音 {seconds} 秒。松开或再按一下发送，按 Esc 放弃",
    firstSound: "{seconds} 秒后出声",
    interrupted: "在 {seconds} 秒处被打断",
    stopped: "已停止",
    limit: "已达到最大长度",
    newConnection: "对话从这里重新开始",
    connecting: "正在连接",
    online: "已连接",
    waiting: "正在重连",
    locked: "需要 API 密钥",
    ended: "已结束",
    retryNow: "立即重试",
    dismiss: "知道了",
    keptText: "尚未连接。消息已保留，连接恢复后再发送。",
    unreachable: "服务器没有响应，正在重试。",
    offline: "本设备已离线。",
    busy: "服务器繁忙：正在通话的人太多，正在重试。",
    refused: "服务器拒绝了对话，正在重试。",
    lost: "连接断开，正在重新连接。",
    endedText: "服务器结束了对话。下一条消息会开始新的对话。",
    endedWhy: "服务器结束了对话：{reason}",
    failed: "回答失败：{message}",
    serverSays: "服务器提示：{message}",
    tapForSound: "浏览器要求先点击页面或按任意键，才会播放声音。",
    insecure:
      "此页面不安全（从另一台机器用 http 打开），浏览器不提供麦克风、摄像头和扬声器，回答只有文字。" +
      "请用 --https 启动服务器并打开 https 地址。",
    noMediaDevices: "此浏览器无法使用麦克风和摄像头。",
    microphoneDenied: "没有麦克风权限。请在浏览器的页面设置中允许，然后重试。",
    microphoneMissing: "没有找到麦克风。请接入麦克风，或者打字。",
    microphoneBusy: "麦克风正被其他程序使用。",
    microphoneFailed: "无法打开麦克风。",
    microphoneLost: "麦克风已被拔出或占用。",
    microphoneSilent: "麦克风没有声音，是否被静音了？",
    tooShort: "太短了。请按住按钮说话。",
    cameraDenied: "没有摄像头权限。请在浏览器的页面设置中允许，然后重试。",
    cameraMissing: "没有找到摄像头。请选择图片文件。",
    cameraBusy: "摄像头正被其他程序使用。",
    cameraFailed: "无法打开摄像头。",
    badPicture: "浏览器无法读取这张图片。",
    take: "拍摄",
    turnCamera: "切换摄像头",
    keyTitle: "此服务器需要 API 密钥",
    key: "API 密钥",
    keyKept: "仅保留到此标签页关闭。",
    missingKey: "",
    wrongKey: "服务器不接受此密钥。",
    connect: "连接",
    listening: "正在听",
    hearing: "你在说话",
    thinking: "正在想",
    speaking: "正在说，可以打断。",
    microphoneMuted: "麦克风已静音",
    muteMicrophone: "麦克风静音",
    hangUp: "挂断",
    captions: "字幕",
    recordingStep: "1. 录音",
    recordingText: "一个人说话约半分钟，安静、没有音乐。可以朗读这段话：",
    passage:
      "星期天我们沿着河边散步，一直走到下雨。一条小船慢慢驶过，船上有人向我们挥手。我们在老桥下躲雨，分吃了一个苹果，" +
      "聊起了夏天。如果你有整整一周的假期，你会做什么？我会睡个懒觉，烤一个面包，再读一读书架上那本放了很多年的蓝色厚书。",
    record: "开始录音",
    stopRecording: "停止录音",
    chooseFile: "选择文件",
    level: "麦克风音量",
    tooQuiet: "声音太小：请靠近麦克风。",
    clipped: "声音太大，已经失真：请离远一点重新录音。",
    noisy: "有噪声：请换个安静的地方，句子之间停顿一下。",
    moreSpeech: "目前很好，请继续说，再说 {seconds} 秒更好。",
    tooShortVoice: "太短：至少需要 {seconds} 秒。",
    goodRecording: "录音很好。",
    unreadRecording: "浏览器无法读取此文件，服务器也许可以。",
    consentStep: "2. 同意",
    consentText: "声音属于说话的人。请写明说话人是谁，以及本人同意。这句话会和声音一起保存。",
    consent: "同意声明",
    acceptSentence: "这是我自己的声音：接受“{sentence}”",
    sentence: "我就是说话人本人，我同意在此服务器上克隆我的声音。",
    nameStep: "3. 名称",
    name: "名称",
    makeVoice: "制作声音",
    makingVoice: "正在制作声音……",
    noRecording: "请先录音或选择文件。",
    stillRecording: "请先停止录音。",
    noName: "请给声音起个名字。",
    noConsent: "同意声明至少需要 10 个字符。",
    madeVoice: "声音 {name} 已制作并选用。",
    ownVoices: "在此服务器上制作的声音",
    delete: "删除",
    deleteVoice: "删除声音 {name}",
    reallyDelete: "确定删除？",
    deletedVoice: "声音 {name} 已删除。",
  },
};

const KEPT = "minimind-o-language"; // a setting, not content

function kept() {
  try {
    return localStorage.getItem(KEPT);
  } catch {
    return null; // storage is switched off
  }
}

let language = kept() ?? ((navigator.languages ?? [navigator.language])[0]?.startsWith("zh") ? "zh" : "en");

/** The text of a name, `{...}` filled in from `values`. */
export function t(name, values = {}) {
  const text = (TEXTS[language] ?? TEXTS.en)[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

/** Puts the texts into the page's elements. */
export function showTexts() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const sentence = t("sentence");
  for (const element of document.querySelectorAll("[data-t]")) {
    element.textContent = t(element.dataset.t, { sentence });
  }
  for (const element of document.querySelectorAll("[data-t-label]")) {
    const text = t(element.dataset.tLabel);
    element.setAttribute("aria-label", text);
    if (element.matches("button, input")) element.title = text;
  }
  for (const element of document.querySelectorAll("[data-t-hint]")) element.placeholder = t(element.dataset.tHint);
  for (const element of document.querySelectorAll("[data-t-alt]")) element.alt = t(element.dataset.tAlt);
}

/** English to Chinese or back. */
export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  try {
    localStorage.setItem(KEPT, language);
  } catch {
    // It holds until the page is loaded again.
  }
  showTexts();
}
