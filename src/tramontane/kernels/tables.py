"""What the codes of GGML's lookup formats stand for: the grids of the i-quants, their signs, small floats.

Owns these tables, as float32 arrays. Must not know: the layout of any block, ops, devices.

The grids are format data that GGML publishes (ggml/src/ggml-common.h, and packed in gguf/quants.py of its `gguf`
package; MIT licence). Each is a set of short vectors over a few levels. Read as numbers whose digits are the levels,
the first element the lowest digit, the vectors of a grid ascend; so a grid is kept as the gaps between its numbers.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_TERNARY = (8, 25, 43)
# Name -> vectors, elements of a vector, levels of an element.
_GRIDS: Mapping[str, tuple[int, int, tuple[int, ...]]] = {
    "IQ2_XXS": (256, 8, _TERNARY),
    "IQ2_XS": (512, 8, _TERNARY),
    "IQ2_S": (1024, 8, _TERNARY),
    "IQ3_XXS": (256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "IQ3_S": (512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "IQ1_S": (2048, 8, (-1, 0, 1)),
}

# The gaps of all grids in the order above: little-endian 16-bit numbers, zlib, base 85.
_GAPS = (
    "c-o~|+m0ML8MezVS50+wPfe%O=}9`1*-3U7qG$+12rCq%2raAC3Kq0ltyWy+iVH4y1TMKoJPXgl^YHoeZ<p)Poe8Ma)m1+H{tw@OuuG{TyBvNtJv"
    "%--{#sS@->Q|mz*~#AwR)i*v$aWcTX}BN`$}!_)TkY2T;Lb!wu$~0y*u><MtvppYK&`TJwI}dmPWnC?@ng6p!-r?sw<56lC#!o4}L7(Zq+NcY*k0"
    "T?{I&O|3AsNmAb*$jrxF9TlD;0y%|XCFy4wJYtr@aJKT5V<AOZA0QD{2-l^|oq{T`vIr9r}79{oZy}*43-fkhE=V7P5QP&vRp#2i_->Gjoe+SApn"
    "0tX4R{emHx9T72Kcv0^7kg^{z4|)Y!rQ>>V2l1WXnv=D1nr>zTeRM&UxTL&R{Bx>8(R4n$6jE}2UY9WN)7CvUv}o*WzUvYotx<fGont{gVrWVP!k"
    "`=Rw^=EOlf$m?D@1}`<_V4xv_%bh@&E*#ZhYxda)B(>_n1&=9G&yJz^#8YuaTz%0GF#>}AGVylsg~zfMO)Z!zi?2!1)yX^+PE<S^$FbFLt9Sf#`L"
    "E$BCBZ}Ij{WN(O%6|m3}@z)%GOz&ge&C6`XznsYab_O3oH(iPfuV}F?@foSqxUSH?5t+U{fS`RsO#zR+0J4iLUNp3>gGL>2e~C3}uIy>=$;;n}jl"
    "fY&eHZF4jA$M1zb7xR;3;oF`8{U&nTHUt&GfdWCtr)zyDV}R^wAD0T|nLq#_TEMmi%}QKVS{VsA5xe>cFS>_iu3Dp#3qm@E)@Z@b_m(cMaQKa<!o"
    "68q{ww=1O$$XM1jL)IUih;O{l*yk%S|K%@Ia|DU48PTJ@EH^+oaF=EcUV#|t@12T^DaVYwXSDaF@ANBZV#L*c4QyC9w!%MOnMaOzTu@=v+#iCb?C"
    "{xMpQTy1VQr|DKcS%1kivit1nLkaF$3}!`Fm8D~v0FWvxtpOCye#JXL$(TB)ROaa8}<I4b5l#*VwuyuUhF}{9hb}_D&~TYF}c_CW6`uj%-&+fJ<+"
    "har$uvLaI;*^`O9(346DMa=06>0?*GoY+d;)TH@`hNcST!=Jp3sUZ|Eog8>TzfDfgW{*Vb1&Z)f^_HtDO34%NhFCVJ$SJgldV6}Z>e<tSq1oOr+J"
    "n7Mu{2)@CZEpYrjGFCnE4?Bwgb%uR=RNqd<gi)d8cB0Ap-g*qxXRMrZ54<Lo9WeHWxjxp8HuIcA*6yj)%-O#6ZlwDu4quY<OU%4V*7f@mpVR+Jx*"
    ";RR=yc6ma?AQ5#H0(+Q>-MeXuA$I&KunCSb^-NF0-f(Hj@8KzH8hob)wFN$CB?>8U8P159r$~wuHJo@aZ^vp`NP;pjvWtu=4|~{0sF+5crT7iL}G"
    "NpQjl|Dz^PB^;eY5*H9;FiFpgqcn)Owit7PZ_ybYdQ}Vo?sAr^Ugu)X_R`V@zxx{@5ekxXbR(%F4JJv`~)bGg6BWNkg_z+{u#Ki*tPq^9=J)JrQC"
    "%?h{f$T4yVD&Y6Zt&Y+^oq!_;B<pgnzi8>?DR~1j$Xg=L-ZL^zr(tZXx|S1&&1<?s-BA6HCq1&j{V4vGoE6^1t|Ib<yWBgx%xR)UP)c7>Ak+*ehI"
    "!xAZ5w*K11s>?#91_{WUJb(VE%`Gri?X(PEM8VQ|H9mZN-2@aPKEEj6XtqS<FS##4)wmUyZedyHt<NF-W{1s8lX)TqCo60ZSIrHnl##)96?@K%v_"
    "9J6Ev-18Zw3NnPfibqPogOOPkSF6|`c1<Sf!gJE_7qt-h)0}yRr-f)~DPH4gKFnyIs-IB0WkQf2=dp3dIFWN%B(AjRD7-JlR)+p<lK#UQJH9o^Lm"
    "T?15p7z?8&~x{yTJVf?G^jZ`Bc)+H2RkGn38$K(s!5ij1m#ON*q=R8;0w}d|inqI@#4U67O29Q&D3<wiAgFD<YyKiq2@^C223nL4&skxGqJzKFV0"
    "BL=3s8xKb%=JEFvqZ_iyxJ(RG3p^uhXY<o^W@bTxI=xN{`=ip%jZF+=xEuBjZypr`=@r|J86Y%9V*>Ke*e6$3$Q$~$ekmFCq{CQCeDGK!~O0vR##"
    "H^1b9cVp;kFJTOlDcfk^)E5@6h8w_HW>Q^F`+<fh<1TO%c$X_^eJnL=yP75=S0SeXA7S59pZuCWj_KU^ZlO@yA%@dd{x}Hlqq-Xl=pP<$9xx{X@f"
    ")agKf$|Jz^v}SXwvM<4*RMUYky`t(I6`NG`VG<$dgm*GY;vv3JE&!@j045~-Y2k&9Vg?LjF*)X?I+CY^Z3>fn&<Ml>BGYngWOI-{A_XPOuaqs?r^"
    "ZaG?KSFD8UbiNcVQjY4tI@<#UF14&_xn7<ZbeiiVuH@R+DH{~CHVJKI#-kpM)Pt6xZF~Fo^4Y=cn4OGJ*3@J`S54dW^;0p!r<1t9O1<8LdZ~MULM"
    "3Jfe4I%AQjM(BpJJJG4p<HlkfUO*H`uq5T$JlF+S8?&WJc&c)K{lHZf@1k;v^FriC`}C@Mz;uMVgU~okUkBSHN;9SZogXQIq*V#H10ao6%0d$?TF"
    "y8qVq^E)V*0JKEQEQla#9LXN57NlLVTIoTx!OfND|YQ*+F@0QGft<)T2UzqMUOTn$4VAPJ@b*kL@Dy~RT(a!K3a5lH9$$T<K=ct)pE+e&4Ig0vja"
    "7GX+Bt4M9X8xMThCX&i--?#$vJ(o+)0rkkfqZp4z^9fuG4l0sei&bdx+-RRb58p;-NYU?JBO%8HVcuV%ref2=(D$*nIKFLEUQOabA!>bN-ZY*&PU"
    "m?Y<lJ@CeoWpkD1UcM$vanyWc;|uh~bJzRk!^L1($6w|SNM;#m5;&(8Xjo5jS`>PD`9jAMkVWEZ3pDtZZfzp4hBYO~1e2Ivb2S!Nk3piQTG--rw@"
    "%g!+qw^BW6M!BHvrNq3`l+owT3Wr&?mT_Z0wS&6JS5xB{RAh2i(r&VqgZ)a0;KQtwBgm$GXP)1~zUNe|)?{CY9J5)OomCeD%-WH^n#4z}tSnCih7"
    "m=}&cX~Tu{?w6k5qbjT(kozOX)G`X-Z)sI-m9|rOK>QCbm-Bx-1&y_U?1QTuoN++eBUoYuVdt$pIy+k3P!fHKa-PNngX~dWh22qq;TL5Y0z4xIB="
    "_gBRvs+G^R4jPudlNp6{;)@He4oX_m&%Tyd$(?U5)>vZlojG=KxT+5AOP#$6QJ+qKWrvv)H{wJQVlv!koG1-Y-Z1RwL@QvAJRfds$x|{h*SB&bUa"
    "jQ)j%ysLvbb@PmCfue-ygcGdb33#?dum39JexM@Y+@<gR3h84O7To=@3QLFq`1EyVPRMixJmAh--AQ^suPDXQ?{x0G?Q=V{eE~}_FAg+@a@W`8D-"
    "MqkjhlI{{_>cggg"
)


def _grid(name: str) -> Floats:
    """float32 [vectors, elements]."""
    start = sum(_GRIDS[other][0] for other in list(_GRIDS)[: list(_GRIDS).index(name)])
    count, width, levels = _GRIDS[name]
    gaps = np.frombuffer(zlib.decompress(base64.b85decode(_GAPS)), "<u2")[start : start + count]
    digits = np.cumsum(gaps, dtype=np.int64)[:, None] // len(levels) ** np.arange(width) % len(levels)
    vectors: Floats = np.array(levels, np.float32)[digits]
    return vectors


def _signs(bits: int) -> Floats:
    """float32 [2**bits, 8] of 1 and -1 where the bit is set; the eighth of seven bits makes their number even."""
    codes = np.arange(1 << bits)[:, None] >> np.arange(8) & 1
    if bits == 7:
        codes[:, 7] = codes.sum(axis=1) % 2
    return (1 - 2 * codes).astype(np.float32)


def _iq4() -> Floats:
    """The sixteen levels of IQ4_NL and IQ4_XS: denser around zero."""
    return np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _e2m1() -> Floats:
    """Twice the values of four-bit floats (Open Compute Project, Microscaling Formats 1.0)."""
    half = [0, 1, 2, 3, 4, 6, 8, 12]
    # GGML reads the negative zero as zero.
    return np.array(half + [0] + [-value for value in half[1:]], np.float32)


def _e8m0() -> Floats:
    """Half the powers of two that a byte of exponent stands for: 2**(code - 128)."""
    powers: Floats = np.exp2(np.arange(256) - 128.0).astype(np.float32)
    return powers


def _ue4m3() -> Floats:
    """Half the values of eight-bit floats without a sign (its bit is ignored), the code 127, not a number, as zero."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[127] = 0
    return (values / 2).astype(np.float32)


LEVELS: Mapping[str, Callable[[], Floats]] = {
    "IQ4": _iq4,
    "E2M1": _e2m1,
    "E8M0": _e8m0,
    "UE4M3": _ue4m3,
    **{name: partial(_grid, name) for name in _GRIDS},
}
"""What codes stand for, by name: made once by `table`."""
_SIGNS: Mapping[str, Callable[[], Floats]] = {"signs7": partial(_signs, 7), "signs8": partial(_signs, 8)}


@cache
def table(name: str) -> Floats:
    """A table by name, read-only: codes index its first axis."""
    array = {**LEVELS, **_SIGNS}[name]()
    array.setflags(write=False)
    return array
