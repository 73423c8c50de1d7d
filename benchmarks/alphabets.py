"""What benchmarks/glyphs.py draws: characters, and the packages of Debian 12 in whose fonts they are found.

Latin letters, digits and kanji are in no set: what is decided on these sets can be checked on others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alphabet:
    """What a set is made of.

    Args:
        classes: characters, one a class, [C]; of those that look alike, only one.
        side: of an image in pixels, S.
        packages: Debian packages whose fonts are drawn.
    """

    classes: str
    side: int
    packages: tuple[str, ...]


def _fonts(names: str) -> tuple[str, ...]:
    return tuple(f"fonts-{name}" for name in names.split())


ALPHABETS = {
    # One case or alphabet of what looks the same at one size: no small к, no Greek Α, no small ψ.
    "cyrillic": Alphabet(
        classes="АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабеёΔΘΛΞΣΥΨΩΖΝαβγδεζηθιλμνξπρςσυω",
        side=16,
        packages=_fonts(
            """
            3270 agave ancient-scripts anonymous-pro arphic-ukai arphic-uming cantarell clear-sans cmu croscore
            crosextra-carlito dejavu-core dejavu-extra ebgaramond ebgaramond-extra fantasque-sans firacode freefont-otf
            georgewilliams go hack horai-umefont inter ipaexfont-gothic ipaexfont-mincho jetbrains-mono johnsmith-induni
            jura kanjistrokeorders konatu lato lexi-gulim liberation linex linuxlibertine manrope migmix monoid mononoki
            morisawa-bizud-gothic morisawa-bizud-mincho mph-2b-damase naver-d2coding noto-core noto-mono oldstandard
            open-sans oradano-mincho-gsrr osifont pc play roboto-slab roboto-unhinted seto sil-gentiumplus
            sil-gentiumplus-compact smiley-sans stix symbola tuffy ukij-uyghur unfonts-core unifont urw-base35 vlgothic
            vollkorn wqy-zenhei yozvox-yozfont-antique
            """
        ),
    ),
    # Without ヘ, ベ, ペ and リ, which are へ, べ, ぺ and り in many fonts.
    "kana": Alphabet(
        classes="あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわゐゑをん"
        "がぎぐげござじずぜぞだぢづでどばびぶべぼぱぴぷぺぽ"
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフホマミムメモヤユヨラルレロワヰヱヲン"
        "ガギグゲゴザジズゼゾダヂヅデドバビブボパピプポ",
        side=24,
        packages=_fonts(
            """
            aoyagi-kouzan-t aoyagi-soseki arphic-gbsn00lp arphic-gkai00mp arphic-ukai arphic-uming baekmuk cherrybomb
            cwtex-fs cwtex-heib cwtex-ming dejima-mincho dotgothic16 droid-fallback georgewilliams hanazono
            horai-umefont ipaexfont-gothic ipaexfont-mincho ipafont-gothic ipafont-mincho kanjistrokeorders kiloji klee
            komatuna konatu kouzan-mouhitsu migmix misaki mmcedar mona morisawa-bizud-gothic morisawa-bizud-mincho
            motoya-l-cedar motoya-l-maruberi mplus nanum-extra naver-d2coding noto-cjk oradano-mincho-gsrr rampart
            reggae ricty-diminished rocknroll sawarabi-gothic sawarabi-mincho seto smiley-sans stick train umeplus
            unfonts-core unfonts-extra unifont vlgothic woowa-bm wqy-zenhei yozvox-yozfont-antique yozvox-yozfont-cute
            yozvox-yozfont-standard-kana yusei-magic
            """
        ),
    ),
}
