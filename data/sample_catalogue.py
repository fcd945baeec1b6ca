"""A seeded generator of synthetic French products in the ENS layout of the Rakuten France challenge.

Nothing here comes from Rakuten: sentences, brands, series and pictures are invented. Only the shape of the
tables follows the challenge (class sizes, share of missing descriptions, lengths, duplicates, HTML), so that
the files written here go through the loader that reads the real ones. A score on this sample says that the
chain runs; it says nothing about the real data.

What each modality can know
---------------------------
Every product has a class and belongs to a neighbourhood of classes that share vocabulary (`GROUPS`):
books (10, 2705, 2280, 2403), toys (1280, 1140, 1281, 1180, 1160, 1300, 1302, 1301, 1320), gaming
(40, 2462, 60, 50, 2905), garden (2582, 2583, 2585), home (1560, 1920, 2060), shop (2522, 2220, 1940).

- Title: with `P_VAGUE_TITLE` it holds words of the neighbourhood only. Otherwise one of the class's own
  templates is used, and some of these are shared by neighbours: `{book} - {author}` serves 10 and 2705.
- Description: with `P_BOILERPLATE` it is shop talk common to all classes, with `P_VAGUE_DESCRIPTION` it
  speaks of the neighbourhood only. Otherwise it holds sentences of the class among the others. The condition
  (new, second-hand, a lot of several) is mostly said here, so it often decides between 10, 2705 and 2403,
  or between 40 and 2462.
- Picture: one of the class's objects (`CLASS_OBJECTS`). Shared: book by 10, 2705 and 2403; magazine by
  2280 and 2403; game case by 40, 2462 and 2905; console and gamepad by 40, 2462, 60 and 50; figurine by
  1140 and 1180; dice by 1281 and 1180; cards by 1281 and 1160; teddy by 1280 and 1140; t-shirt by 1140
  and 1301; table by 1560 and 2582; pillow by 1920 and 2060; lounger by 2582 and 2583. With
  `P_NEIGHBOUR_PICTURE` the picture shows the object of a class of the neighbourhood, with `P_PARCEL` a
  closed box. Second-hand classes are more often photographed at home, garden classes outdoors; colour,
  pose and scale say nothing.

The draws for the three are independent given the class. So each modality knows something that the others
do not, and no model can reach 100%. The probabilities were set once from plausibility, for no ranking.
About `P_FOREIGN` of the rows are in English or German, title and description alike.

Departures from the real data
-----------------------------
- Every class has at least `MIN_ROWS` rows and `MIN_DESCRIBED` descriptions, so that it can be split;
  really, class 2462 describes 4% of its rows and class 2403 3%.
- Descriptions stop at `MAX_WORDS` words; the longest real one has 2,068.
- Real titles name many more things, real photographs are photographs, and a real copy of a description may
  stand under an unrelated class: here a copied text comes from the same class, or from a neighbour.

Each product draws from its own generator, seeded with (seed, index), so the files depend on the seed and the
row counts, and not on the number of workers.
"""

import argparse
import colorsys
import csv
import hashlib
import html.entities
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

VERSION = 1
P_VAGUE_TITLE = 0.25
P_BOILERPLATE = 0.20
P_VAGUE_DESCRIPTION = 0.20
P_NEIGHBOUR_PICTURE = 0.12
P_PARCEL = 0.06
P_FOREIGN = 0.04
P_GERMAN = 0.25           # of the foreign rows
P_SAME_CLASS_COPY = 0.85  # a copied text comes from the same class, else from a neighbour
TITLE_COPIES = 0.031      # of all rows
DESCRIPTION_COPIES = 0.138  # of the described rows
P_HTML = 0.45             # of the descriptions
P_ENTITIES = 0.30         # of the descriptions
P_TITLE_ENTITIES = 0.04
P_CAPITALS = 0.12         # of the titles; and of the first sentences of descriptions
P_BLACK_BORDER = 0.15
MIN_ROWS, MIN_DESCRIBED = 16, 12
TITLE_MEDIAN, TITLE_SPREAD, TITLE_MAX = 10.0, 0.45, 56  # words: median and sigma of a log-normal
TEXT_MEDIAN, TEXT_SPREAD, MAX_WORDS = 63.0, 0.95, 400  # described rows; a median near 35 over all
TEXT, PICTURE, TABLE = 1, 2, 3  # streams of random numbers

# --- Vocabulary -------------------------------------------------------------------------------------------
# Alternatives are separated by "|"; {name} is replaced by one alternative of that name, or by a number.
# Attributes are invariable ("en bois", "coloris bleu"), so that they agree with any noun.
NUMBERS = {"n": (2, 12), "t": (1, 9), "num": (13, 980), "year": (1948, 2004), "newyear": (2015, 2020),
           "cm": (8, 240), "day": (1, 28), "age": (3, 12), "kg": (2, 60), "w": (12, 900), "pages": (90, 720)}
WORDS = {
    "colour": "bleu|rouge|vert|noir|blanc|gris|beige|jaune|rose|turquoise|anthracite|taupe|violet|"
        "multicolore",
    "material": "bois|métal|coton|résine|plastique|acier|aluminium|tissu|polyester|bambou|verre|cuir "
        "synthétique",
    "size": "{cm} x {cm} cm|{cm} x {cm} x {cm} cm|Ø {cm} cm|{cm}x{cm}cm|hauteur {cm} cm",
    "letter": "A|B|C|D|F|G|H|K|L|M|N|P|R|S|T|V|X|Z",
    "ref": "{letter}{letter}-{num}|{letter}{num}{letter}|{letter}{letter}{letter}{num}|{num}-{num}",
    "month": "janvier|février|mars|avril|mai|juin|juillet|août|septembre|octobre|novembre|décembre",
    "date": "{day} {month} {year}|{day}/{t}/{year}",
    "firstname": "Camille|Aurélie|Théo|Solène|Baptiste|Hélène|Gaspard|Inès|Lucien|Maëlle|Rémi|Clémence|Noé|"
        "Agathe",
    "surname": "Verdon|Lacombaz|Morvenne|Tessandier|Brival|Quintrel|Delorbe|Sauvanet|Ferrandin|Gaudrel|"
        "Vasselin",
    "author": "{firstname} {surname}|{surname} {firstname}|{letter}. {surname}|{surname}",
    "book": "{opening} {ending}|{opening} {ending}|{opening} {ending} et autres nouvelles|{topic} : "
        "{opening} {ending}",
    "opening": "Le Secret|La Maison|Les Ombres|Le Dernier Train|Mémoires|La Promesse|L'Été|Les Héritiers|La "
        "Mécanique|Le Jardin|Chroniques|L'Île|La Nuit|Une enfance|Le Carnet|Les Voyageurs",
    "ending": "du phare|de la forêt|des brumes|sans retour|d'Aurélie|au bord du fleuve|de Valmorain|du Nord|"
        "des oubliés|de l'horloger|en hiver|du capitaine|des collines|de papier|sous la neige|de la marée",
    "topic": "Spécial jardin|Les châteaux oubliés|La marine à voile|Recettes d'automne|L'histoire du rail|"
        "Les grands peintres|Apprendre le dessin|La vie des abeilles|Sciences et techniques|Le Moyen Âge",
    "genre": "policier|fantastique|historique|jeunesse|de cuisine|de voyage|de poche|d'art|de jardinage",
    "format": "poche|broché|relié|grand format|édition illustrée|couverture souple",
    "publisher": "Éditions Valmorain|Éditions du Quai Vert|La Plume Grise|Presses d'Orlande|Atelier "
        "Tessandier",
    "mag": "Le Courrier des Rivages|Moteurs d'Hier|Ciné Vallée|La Gazette du Faubourg|Saveurs & Clochers|"
        "Science Claire|Vapeur & Rails|Le Petit Colombier|Modes d'Antan|Sport Dimanche Soir",
    "series": "Drakelune|Galdrim|Les Sylvaroks|Astrelune|Vorgane|Mini Tribu|Ostrival|Kapuchon|Brumaciel|"
        "Zorbilles",
    "hero": "chevalier|princesse|dragon|sorcier|pirate|licorne|robot|guerrière|dinosaure|aviateur|elfe|"
        "monstre",
    "toybrand": "Tilvane|Joujoval|Pimpaloo|Lutinette|Cubolin|Grelottin|Oursavelle",
    "game": "Drakelune {t}|Turbo Rivage {t}|Galdrim Legends|Stade Mania {newyear}|Opération Vorgane|Les "
        "Vergers de Valmorain|Astrelune : l'Éveil|Rallye Tempête|Le Donjon d'Ostrival|Zombie Faubourg",
    "platform": "Novabox|Novabox 2|Orion 4|Orion 3|Kivo 2|Zenta Pocket|Mégadeck|PC",
    "edition": "édition standard|édition collector|version française|import|édition limitée|intégrale",
    "gamebrand": "Hexalynx|Norvick|Kelmora|Pixandre|Ferrolynx|Volterion",
    "gardenbrand": "Jardivane|Soléo Nord|Florandie|Vertalise|Aquavelle|Norvick",
    "homebrand": "Maison Velcourt|Nordika Home|Casavelle|Orvalune|Atelier Brumaire|Lumio & Co",
    "room": "chambre|salon|cuisine|entrée|bureau|salle de bain|salle à manger",
    "style": "scandinave|industriel|moderne|vintage|bohème|contemporain|campagne chic",
    "shopbrand": "Papétis|Croquivert|Maison Gourlande|Ronronax|Terrasud|Plumélia",
    "motif": "étoiles|fleurs|rayures|animaux|feuilles tropicales|montagnes|mandala|chats",
}

# --- Neighbourhoods: codes, titles without a class word, additions to any title, sentences ------------------
GROUPS = {
    "books": ((10, 2705, 2280, 2403),
        "{book}|{book} - {author}|{author} - {book}|{book} ({publisher})|{topic} - {publisher}",
        "{format}|{publisher}|{genre}|{author}|{pages} pages|texte intégral|{topic}|{year}",
        "L'ouvrage traite du thème suivant : {topic}.|Texte de {author}, illustrations de {author}.|Langue : "
        "français, {pages} pages, format {format}.|Publication : {publisher}.|Une lecture agréable pour les "
        "amateurs du genre {genre}.|Sommaire : {topic}, {topic}, {book}."),
    "toys": ((1280, 1140, 1281, 1180, 1160, 1300, 1302, 1301, 1320),
        "{series} {hero}|{toybrand} {series} réf. {ref}|{series} - {hero} {colour}|{toybrand} {hero} {num}",
        "dès {age} ans|coloris {colour}|collection {series}|idée cadeau|{size}|en {material}|{hero}|"
        "{toybrand}|cadeau pour enfant|réf. {ref}|série {t}",
        "L'univers {series} plaît aux petits comme aux grands.|Convient aux enfants à partir de {age} ans.|"
        "Une belle idée de cadeau pour un anniversaire ou pour Noël.|Dimensions : environ {size}.|Produit de "
        "la gamme {toybrand}, en {material}, coloris {colour}.|Attention : ne convient pas aux enfants de "
        "moins de 36 mois, petites pièces."),
    "gaming": ((40, 2462, 60, 50, 2905),
        "{game} {platform}|{game} - {edition} - {platform}|{gamebrand} {platform} {colour}|{platform} {game}",
        "{edition}|{platform}|{game}|{gamebrand}|multijoueur|coloris {colour}|réf. {ref}|jeu et accessoire",
        "Compatible avec {platform} et {platform}.|Rejoignez vos amis en ligne pour des parties endiablées.|"
        "Plongez dans l'aventure de {game}.|Marque : {gamebrand}, référence {ref}.|Un incontournable pour "
        "les joueurs sur {platform}.|Textes et voix en français, {edition}."),
    "garden": ((2582, 2583, 2585),
        "{gardenbrand} {ref} jardin {size}|{gardenbrand} extérieur en {material} {colour}|Accessoire de "
        "jardin {gardenbrand} {size}|Kit {gardenbrand} {ref} pour l'extérieur",
        "pour l'extérieur|{size}|coloris {colour}|en {material}|réf. {ref}|{gardenbrand}|{kg} kg|lot de {n}",
        "Profitez de votre jardin ou de votre terrasse toute la belle saison.|Structure en {material}.|"
        "Résiste aux intempéries, au gel et aux rayons UV.|Dimensions hors tout : {size}.|Montage facile, "
        "notice et visserie fournies.|Poids : {kg} kg, coloris {colour}."),
    "home": ((1560, 1920, 2060),
        "{homebrand} {room} {style} {colour}|{homebrand} {ref} {size}|Collection {homebrand} {style} {size}|"
        "{homebrand} maison motif {motif} {colour}",
        "{size}|coloris {colour}|style {style}|{room}|en {material}|motif {motif}|{homebrand}|réf. {ref}",
        "Une touche de style {style} pour votre intérieur.|Matière : {material}.|Couleur : {colour}.|"
        "S'accorde avec tous les intérieurs : {room}, {room} ou {room}.|Dimensions : {size}.|La collection "
        "{homebrand} associe élégance et confort.|Motif : {motif}, finition soignée."),
    "shop": ((2522, 2220, 1940),
        "{shopbrand} lot de {n} {colour}|{shopbrand} {ref} x {n}|Coffret {shopbrand} motif {motif}|"
        "Assortiment {shopbrand} {num} pièces",
        "lot de {n}|{shopbrand}|coloris {colour}|motif {motif}|{size}|réf. {ref}|{num} g|paquet de {n}",
        "Contenu : {n} unités par lot.|Marque : {shopbrand}, qualité suivie.|Conditionnement : {num} g.|Un "
        "petit plaisir du quotidien signé {shopbrand}.|Présentation soignée, motif {motif}."),
}

NEIGHBOURHOOD = {code: name for name, (codes, *_) in GROUPS.items() for code in codes}

BOILERPLATE = """Expédition sous {n} jours ouvrés dans un emballage soigné.
Satisfait ou remboursé pendant {day} jours, frais de retour à la charge de l'acheteur.
N'hésitez pas à nous contacter pour toute question !
Produit garanti {n} mois par le vendeur.
Les photos ne sont pas contractuelles, la couleur peut varier selon votre écran.
Paiement sécurisé et suivi du colis par e-mail.
Frais de port réduits dès {n} articles achetés dans notre boutique.
Notre service client vous répond du lundi au vendredi, de 9 h à 18 h.
Merci de votre visite & à bientôt sur notre boutique.
Vendeur professionnel depuis {newyear}, plus de {num} évaluations positives.
Référence du vendeur : {ref}.
Quantité limitée, commandez sans attendre !!!
100% neuf ou reconditionné selon l'annonce, voir l'état indiqué ci-dessus.
Livraison en point relais ou à domicile, numéro de suivi fourni.""".splitlines()

# --- Classes: titles and sentences that only the class uses (some title templates serve two neighbours) ----
CLASSES = {
    10: ("{book} - {author}|{book} de {author} - {year}|{author} : {book} - occasion",
        "Livre d'occasion, couverture légèrement usée.|Exemplaire déjà lu, tranche un peu jaunie, intérieur "
        "propre.|Publié en {year}, ex-libris d'un ancien propriétaire en page de garde.|État correct, "
        "quelques pages cornées."),
    2705: ("{book} - {author}|{book} de {author} - {format}|{book}, tome {t} - {author} - nouveauté "
        "{newyear}",
        "Livre neuf, envoyé directement par la librairie.|Parution : {newyear}, première édition.|Dans ce "
        "nouveau roman, {firstname} quitte sa ville natale et découvre un secret de famille.|Un guide clair "
        "pour apprendre pas à pas, avec de nombreux exercices corrigés."),
    2280: ("{mag} n° {num} du {date}|{mag} numéro {num} - {topic}|Journal ancien {mag} du {date}|Revue {mag} "
        "n° {num}",
        "Revue d'époque, numéro {num} du {date}.|Journal complet, pliures d'usage, papier jauni.|Au sommaire "
        "de ce numéro : {topic}, {topic}.|Magazine de {pages} pages, agrafes un peu rouillées."),
    2403: ("Lot de {n} livres {genre}|Lot de {n} {mag} - {year}|{book} - {author} - {n} volumes|{mag} - {n} "
        "numéros",
        "Lot de {n} livres vendus ensemble, non séparables.|Le lot comprend : {book}, {book} et {book}.|"
        "Ensemble de {n} revues de l'année {year}.|Les {n} volumes sont d'occasion, état variable selon les "
        "titres."),
    1280: ("Jouet {hero} {toybrand}|Peluche {hero} {series} {size}|Figurine {hero} {toybrand}|Robot jouet "
        "{series}",
        "Ce jouet développe l'imagination et la motricité de l'enfant.|La peluche est douce et lavable à 30 "
        "°C.|Fonctionne avec {n} piles AA (non fournies), sons et lumières.|Un compagnon de jeu pour "
        "inventer des histoires."),
    1140: ("Figurine {hero} {series} {cm} cm|Statuette {series} - {hero} - édition limitée|Porte-clés "
        "{series} {hero}|T-shirt {series} {hero}",
        "Figurine de collection vendue dans sa boîte à fenêtre.|Produit dérivé sous licence {series}, pièce "
        "pour collectionneur.|Statuette en PVC, socle inclus, {cm} cm.|Mug, porte-clés ou figurine : tout "
        "l'univers {series} pour les fans."),
    1281: ("Jeu de société {series}|Jeu de plateau {series} - {hero}|Puzzle {num} pièces {series}|Jeu de "
        "cartes {series}",
        "Jeu de société pour {n} joueurs, partie d'environ {day} minutes.|La boîte contient un plateau, des "
        "cartes, {n} pions et deux dés.|Règle du jeu simple à apprendre en famille.|Puzzle de {num} pièces "
        "en carton."),
    1180: ("Figurine {series} {hero} à peindre|Miniature {hero} {series} 28 mm|Starter {series} {n} "
        "figurines|Armée {series} - {hero}",
        "Miniatures à l'échelle 28 mm, livrées non peintes, à assembler.|Extension pour jeu de rôle : {n} "
        "figurines et leurs socles.|Unité de {hero} pour votre armée {series}.|Dés et livret de règles pour "
        "les batailles fantastiques."),
    1160: ("Carte {series} {hero} n° {num}|{series} carte rare {hero} {t}/{num}|Booster {series}|Lot de {n} "
        "cartes {series}",
        "Carte à collectionner, numéro {num}, version française.|Booster scellé de {n} cartes.|Carte rare "
        "brillante, état proche du neuf, sous pochette.|Complétez votre classeur avec la série {t}."),
    1300: ("Drone {toybrand} {ref} caméra HD|Maquette {hero} échelle 1/{day}|Voiture télécommandée {series} "
        "1/{n}|Batterie {w} mAh pour drone {ref}",
        "Drone radiocommandé 2,4 GHz, autonomie de {n} minutes.|Maquette à monter et à peindre, échelle "
        "1/{day}.|Moteur brushless, châssis en aluminium, pièce de rechange.|Modèle réduit fidèle, hélices "
        "et batterie comprises."),
    1302: ("Toboggan {toybrand} {size}|Ballon {series} {cm} cm|Jeu de plein air {series}|Trampoline "
        "{toybrand} Ø {cm} cm",
        "Jeu de plein air pour courir, sauter et lancer.|Balançoire et toboggan pour équiper le jardin des "
        "enfants.|Ballon livré dégonflé, pompe fournie.|Tir à l'arc, cerf-volant ou trottinette : vive le "
        "grand air."),
    1301: ("T-shirt enfant {hero} {age} ans|Baby-foot {toybrand}|Jeu de fléchettes {toybrand}|Chaussettes "
        "enfant {motif}",
        "Vêtement pour enfant, taille {age} ans, 100 % coton.|Baby-foot de café avec {n} balles.|Cible de "
        "fléchettes avec {n} fléchettes, comme au café.|Lavable en machine à 30 °C, col rond, manches "
        "courtes."),
    1320: ("Poussette {toybrand} {colour}|Biberon {toybrand} {num} ml|Gigoteuse bébé motif {motif}|Siège "
        "auto {toybrand}",
        "Indispensable pour bébé dès la naissance.|Tétine en silicone, sans BPA, biberon de {num} ml.|"
        "Poussette pliable avec harnais à cinq points.|Tapis à langer, doudou et lit parapluie pour jeunes "
        "parents."),
    40: ("{game} - {platform}|Jeu {platform} {game}|{game} {platform} - {edition}|Jeu vidéo {game}",
        "Jeu vidéo neuf sous blister pour {platform}.|Disque avec boîtier et notice en français.|Mode "
        "histoire d'une durée de {day} heures et mode deux joueurs.|Classification : plus de {age} ans."),
    2462: ("{game} - {platform} occasion|{game} {platform}|Console {platform} d'occasion|Lot de {n} jeux "
        "{platform}",
        "Jeu d'occasion testé, disque légèrement rayé.|Console d'occasion avec une manette et ses câbles.|"
        "Boîtier abîmé, notice absente, fonctionne parfaitement.|Rétro : cartouche seule, sans boîte "
        "d'origine."),
    60: ("Console {platform} {num} Go|Pack console {platform} + {game}|Console portable {platform} {colour}|"
        "Console rétro {gamebrand} {num} jeux",
        "Console de jeux neuve, disque dur de {num} Go.|La console est livrée avec une manette et un câble "
        "HDMI.|Écran portable de {t} pouces, batterie longue durée.|Console rétro avec {num} jeux "
        "préinstallés."),
    50: ("Manette {gamebrand} pour {platform}|Casque gaming {gamebrand} {ref}|Housse pour {platform}|Câble "
        "et chargeur {platform} {gamebrand}",
        "Manette sans fil avec double vibration.|Casque avec micro réglable pour entendre chaque pas de "
        "l'adversaire.|Accessoire non officiel pour {platform}.|Câble de charge de {t} m, station d'accueil "
        "pour deux manettes."),
    2905: ("{game} - PC - jeu à télécharger|{game} {edition} téléchargement|Code {game} PC|{game} - PC",
        "Jeu PC à télécharger : un code vous est envoyé par e-mail.|Version dématérialisée, aucune livraison "
        "postale.|Configuration minimale : processeur {t} GHz, {n} Go de mémoire vive.|Activation en ligne "
        "obligatoire."),
    2582: ("Salon de jardin {gardenbrand} {n} places|Parasol {gardenbrand} {size}|Bain de soleil en "
        "{material}|Table de jardin {size}",
        "Salon de jardin avec table basse et {n} fauteuils.|Parasol déporté à manivelle, toile de {num} "
        "g/m².|Chaise longue pliante pour la terrasse.|Coussins d'assise déhoussables, tonnelle et pergola "
        "assorties."),
    2583: ("Piscine {gardenbrand} {size}|Bâche de piscine {size}|Pompe filtrante {gardenbrand} {w} W|Robot "
        "piscine {ref}",
        "Piscine hors sol, liner bleu, échelle de sécurité.|Filtration à cartouche de {w} litres par heure.|"
        "Bâche à bulles pour garder l'eau chaude et propre.|Chlore, épuisette et balai pour l'entretien du "
        "bassin."),
    2585: ("Taille-haie {gardenbrand} {w} W|Râteau {gardenbrand} manche {material}|Sécateur {ref}|Tuyau "
        "d'arrosage {day} m",
        "Outil de jardin à lame en acier trempé.|Moteur de {w} W pour tailler, scier et tondre.|Manche "
        "ergonomique pour bêcher et ratisser sans effort.|Pièce de rechange pour tondeuse et tronçonneuse."),
    1560: ("Canapé {n} places {homebrand} {colour}|Table basse {style} en {material}|Meuble de rangement "
        "{room} {size}|Chaise {style} {colour}",
        "Meuble en kit à monter soi-même.|Canapé convertible, assise en mousse.|Table avec plateau en "
        "{material} et pieds en métal.|Armoire, matelas ou bureau : {n} tiroirs de rangement."),
    1920: ("Housse de couette {motif} {size}|Parure de lit {homebrand} {size}|Serviette de bain {colour}|"
        "Housse de coussin {motif} {size}",
        "Linge de maison en coton, {num} fils/cm².|Parure de lit avec housse de couette et deux taies "
        "d'oreiller.|Lavable à 60 °C, sèche-linge possible.|Rideau, nappe ou drap : un tissu doux et "
        "résistant."),
    2060: ("Tableau décoratif {motif} {size}|Vase {style} en {material}|Sticker mural {motif}|Coussin "
        "décoratif {motif}",
        "Décoration murale prête à accrocher.|Vase pour fleurs séchées, {day} cm de haut.|Guirlande et "
        "bougie pour une ambiance chaleureuse.|Toile imprimée sur châssis, cadre en {material}."),
    2522: ("Carnet {shopbrand} {pages} pages|Lot de {n} stylos {shopbrand}|Cahier motif {motif}|Trousse "
        "{colour}",
        "Carnet à spirale de {pages} pages lignées.|Stylo à encre gel, pointe fine de 0,7 mm.|Fournitures "
        "scolaires pour la rentrée et le bureau.|Classeur, agenda et crayons de couleur."),
    2220: ("Gamelle pour chien {shopbrand}|Jouet pour chat {motif}|Collier pour chien {colour}|Panier pour "
        "chat {size}",
        "Pour chiens et chats de toutes tailles.|Gamelle antidérapante en inox.|Os à mâcher qui aide à "
        "nettoyer les dents de votre animal.|Laisse et harnais réglables, {cm} cm."),
    1940: ("Bonbons {shopbrand} {num} g|Thé {shopbrand} {num} g|Confiture {shopbrand} {num} g|Café en grains "
        "{num} g",
        "Ingrédients : sucre, farine de blé, arômes naturels.|À conserver dans un endroit frais et sec.|"
        "Bonbons tendres au goût de fruits.|Valeurs nutritionnelles pour 100 g : {num} kcal."),
}

# Nouns of the foreign rows: English, German.
FOREIGN_NOUNS = {
    10: ("used paperback", "gebrauchtes Buch"), 2705: ("new book", "neues Buch"),
    2280: ("magazine", "Zeitschrift"), 2403: ("set of books", "Bücherpaket"),
    1280: ("kids toy", "Kinderspielzeug"), 1140: ("figure", "Sammelfigur"),
    1281: ("board game", "Brettspiel"), 1180: ("miniature", "Miniatur"),
    1160: ("trading card", "Sammelkarte"), 1300: ("drone", "Modellbausatz"),
    1302: ("outdoor game", "Gartenspiel"), 1301: ("kids shirt", "Kinderhemd"),
    1320: ("baby stroller", "Kinderwagen"), 40: ("video game", "Videospiel"),
    60: ("game console", "Spielkonsole"), 2462: ("used video game", "gebrauchtes Spiel"),
    50: ("controller", "Controller"), 2905: ("PC download", "PC-Download"),
    2582: ("garden chair", "Gartenstuhl"), 2583: ("swimming pool", "Schwimmbecken"),
    2585: ("pruner", "Gartenschere"), 1560: ("sofa", "Sofa"), 1920: ("bed linen", "Bettwäsche"),
    2060: ("wall picture", "Wandbild"), 2522: ("notebook", "Notizbuch"), 2220: ("dog bowl", "Hundenapf"),
    1940: ("sweets", "Bonbons"),
}
# Per language: titles, additions to a title, sentences; @ stands for the noun.
FOREIGN = {
    "en": (
        "@ {ref} {series}|{series} @ {size}|High quality @ - {num}",
        "free shipping|{size}|model {ref}|gift idea|brand new|best price|size {letter}|{num} pcs",
        "This @ is a great gift for family and friends.|Please allow 1-3 cm difference due to manual "
        "measurement.|Package includes: {n} x @.|Size: {size}.|Model number: {ref}.|100% brand new and high "
        "quality.|Colour may vary slightly because of the light.|If you have any question, please feel free "
        "to contact us."),
    "de": (
        "@ {ref} {series}|{series} - @ - {size}|@ von {surname}",
        "{size}|Modell {ref}|Geschenkidee|gute Qualität|schneller Versand|{num} Stück",
        "Dieses Angebot: @ in guter Qualität.|Lieferumfang: {n} x @.|Größe: {size}.|Artikelnummer: {ref}.|"
        "Der Versand erfolgt innerhalb von {n} Tagen.|Bei Fragen schreiben Sie uns bitte eine Nachricht."),
}

# --- Pictures: objects as lists of shapes in a square of 100 x 100 units, y downwards -----------------------
# "r colour x0 y0 x1 y1 [radius]" rectangle, "e" ellipse (box), "p" polygon, "l colour width x y ..." line,
# "i colour from to box" pie, "a colour width from to box" arc, "g colour n box" checkerboard of n x n.
# A leading 1 or 2 marks an optional part: all parts with that digit are drawn, or none.
# Colours: a b c random, d dark a, t light a, k black, h grey, w white, n wood, s skin, u water, y leaf.
OBJECTS = {
    "book": "p d 21 12 29 8 29 92 21 96;p w 29 92 80 92 76 96 21 96;r a 29 8 80 92 1;r w 36 17 73 23;r w 42 "
        "27 67 30;1e b 38 40 71 72;2p c 55 42 72 74 37 74;r t 42 82 66 85",
    "stack": "r a 14 76 88 92 2;r w 76 79 88 89;r b 20 60 84 76 2;r w 72 63 84 73;r c 12 46 80 60 2;r w 12 "
        "49 22 57;r d 20 31 86 46 2;1r t 16 16 78 31 2;1r w 68 19 78 28;r w 24 82 50 85;r w 30 66 56 69;r w "
        "34 51 60 54;r w 34 37 60 40",
    "magazine": "p h 24 9 84 9 84 97 24 97;r w 20 5 80 94;r a 20 5 80 22;r w 26 10 72 18;r b 24 26 60 66;e s "
        "34 32 50 50;p c 28 66 34 51 50 51 56 66;r k 64 28 76 30;r h 64 34 76 36;r k 64 42 76 44;r h 64 48 "
        "76 50;r c 24 71 70 76;r h 24 80 62 82;1e c 58 74 78 92;2r h 24 86 54 88",
    "notebook": "r a 24 8 82 94 4;r w 38 22 72 42 2;r h 42 27 68 29;r h 42 34 60 36;e h 18 14 30 19;e h 18 "
        "26 30 31;e h 18 38 30 43;e h 18 50 30 55;e h 18 62 30 67;e h 18 74 30 79;e h 18 86 30 91;1r b 66 8 "
        "72 94;2e c 44 54 66 76",
    "pens": "r a 32 14 39 60;p n 32 14 39 14 35.5 4;r c 42 10 49 60;p s 42 10 49 10 45.5 0;r t 52 16 59 60;p "
        "n 52 16 59 16 55.5 6;1r k 61 20 66 60;r b 27 50 71 96 3;r w 27 60 71 66;2e a 42 70 56 84",
    "game_case": "1e h 56 26 98 68;1e w 74 44 80 50;r k 18 5 78 95 3;r a 23 7 77 94 2;r b 23 7 77 18;r w 30 "
        "10 58 15;p c 28 84 50 34 72 84;e w 43 26 57 40;2p d 34 84 62 48 74 84;r w 60 86 74 91;r k 26 86 36 "
        "91",
    "console": "r k 6 36 94 66 5;r h 6 49 94 52;r d 14 40 56 45;e a 76 39 86 48;r w 14 56 30 60;r w 34 56 50 "
        "60;1e a 30 70 48 92;1e a 56 70 74 92;1r a 38 72 66 86 4;1e w 36 76 42 82;1e c 62 76 68 82;2r c 60 "
        "30 90 36",
    "gamepad": "e a 3 34 44 90;e a 56 34 97 90;r a 20 30 80 68 14;r k 16 45 34 51;r k 22 39 28 57;e b 72 38 "
        "79 45;e c 78 45 85 52;e w 72 52 79 59;e t 66 45 73 52;e k 32 54 46 68;e h 36 58 42 64;e k 54 54 68 "
        "68;e h 58 58 64 64;r k 44 38 56 42 2;1l k 3 50 30 50 14 66 4",
    "headset": "a a 8 180 360 14 8 86 96;r k 8 46 28 80 8;r k 72 46 92 80 8;r b 14 50 25 76 4;r b 75 50 86 "
        "76 4;1l k 3 18 80 30 92 48 94;1e c 44 89 58 99;2l h 2 82 80 84 96 70 99",
    "screen": "r k 6 10 94 74 4;r a 10 14 90 70;r t 10 14 90 22;p w 43 26 57 26 57 44 68 44 50 60 32 44 43 "
        "44;r w 30 62 70 65;r h 44 74 56 86;r h 28 85 72 91 3;1e c 76 26 86 36;2r b 14 28 26 50",
    "robot": "l k 3 50 14 50 3;e c 46 0 54 7;r h 14 42 27 70 5;r h 73 42 86 70 5;r a 29 40 71 74 6;r b 32 12 "
        "68 38 6;e w 38 18 49 29;e w 51 18 62 29;e k 41 21 46 26;e k 54 21 59 26;r k 42 32 58 34;r d 33 74 "
        "47 94 3;r d 53 74 67 94 3;e c 43 50 57 64;1r w 34 44 40 48;2r w 60 44 66 48",
    "teddy": "e a 22 4 42 26;e a 58 4 78 26;e t 27 9 38 20;e t 62 9 73 20;e a 10 46 36 64;e a 64 46 90 64;e "
        "d 22 78 48 98;e d 52 78 78 98;e a 27 44 73 92;e t 36 54 64 86;e a 25 8 75 52;e t 39 28 61 48;e k 36 "
        "22 42 28;e k 58 22 64 28;e k 46 31 54 37;1p c 50 50 34 44 34 58;1p c 50 50 66 44 66 58;2r b 40 62 "
        "60 68",
    "figurine": "e k 20 84 80 98;e h 22 82 78 94;2p c 38 36 62 36 76 82 24 82;r d 37 62 48 88 2;r d 52 62 63 "
        "88 2;p a 34 36 66 36 62 66 38 66;l a 7 36 40 22 60;l a 7 64 40 80 54;1l h 3 80 66 84 16;e s 18 56 "
        "26 64;e s 76 50 84 58;e s 39 12 61 36;p b 37 24 41 7 59 7 63 24;e k 44 22 48 26;e k 52 22 56 26;r b "
        "38 50 62 54",
    "tshirt": "p a 30 14 42 11 50 17 58 11 70 14 94 34 82 48 72 39 72 92 28 92 28 39 18 48 6 34;p d 42 11 50 "
        "17 58 11 50 23;1e b 38 38 62 62;2r c 34 66 66 71;1p w 50 41 58 58 42 58",
    "dice": "p t 32 8 56 20 34 32 10 20;p a 10 20 34 32 34 62 10 50;p d 56 20 34 32 34 62 56 50;e w 28 17 38 "
        "23;e w 14 30 19 36;e w 24 46 29 52;e w 43 37 48 43;p w 68 40 92 52 70 64 46 52;p h 46 52 70 64 70 "
        "94 46 82;p w 92 52 70 64 70 94 92 82;e k 64 49 74 55;e k 51 62 56 68;e k 60 76 65 82;e k 79 68 84 "
        "74;1e b 12 72 30 90",
    "board": "r n 5 5 95 95 3;g a 6 12 12 88 88;e c 22 60 36 74;p c 29 48 38 74 20 74;e c 25 43 33 51;e b 62 "
        "30 76 44;p b 69 18 78 44 60 44;e b 65 13 73 21;1r w 50 62 62 74 2;1e k 54 66 58 70;2r w 72 72 82 82 "
        "2",
    "cards": "p w 6 30 36 16 58 78 28 92;p a 11 33 34 22 46 54 23 65;p w 28 20 60 18 64 84 32 86;p b 32 24 "
        "57 22 60 56 35 58;p w 56 16 90 28 68 92 36 80;p c 60 22 84 31 73 62 49 54;e t 60 34 73 47;r h 48 72 "
        "60 74;1e w 40 32 52 46",
    "drone": "l k 4 22 28 78 72;l k 4 78 28 22 72;e t 2 18 42 34;e t 58 18 98 34;e t 2 62 42 78;e t 58 62 98 "
        "78;e k 18 23 26 30;e k 74 23 82 30;e k 18 67 26 74;e k 74 67 82 74;r a 34 36 66 66 12;e k 42 48 58 "
        "64;e u 46 52 54 60;r c 44 40 56 44;1l k 2 30 80 30 92 40 92;2l k 2 70 80 70 92 60 92",
    "car": "p a 4 66 8 52 26 48 38 30 68 30 82 48 94 54 96 66 92 72 8 72;p u 31 48 41 35 52 35 52 48;p u 56 "
        "48 56 35 66 35 76 48;e k 14 58 36 80;e h 20 64 30 74;e k 64 58 86 80;e h 70 64 80 74;r c 90 56 96 "
        "60;1r b 8 60 92 63;2l k 2 86 48 92 24",
    "ball": "e a 8 8 92 92;i b 300 360 8 8 92 92;i w 60 120 8 8 92 92;i c 180 240 8 8 92 92;e w 42 42 58 58;"
        "1e t 22 20 38 34",
    "slide": "l n 4 16 94 26 14;l n 4 34 94 38 18;l n 3 19 80 35 80;l n 3 21 66 36 66;l n 3 23 52 37 52;l n "
        "3 25 38 37 38;p a 26 20 44 18 74 72 98 84 98 92 68 84;p t 30 23 40 22 72 78 94 87 70 80;r b 24 8 44 "
        "22 3;1e c 4 74 24 94",
    "dartboard": "e k 6 6 94 94;e w 12 12 88 88;i a 0 36 12 12 88 88;i a 72 108 12 12 88 88;i a 144 180 12 "
        "12 88 88;i a 216 252 12 12 88 88;i a 288 324 12 12 88 88;e b 34 34 66 66;e w 38 38 62 62;e c 44 44 "
        "56 56;1l k 2 50 50 78 30;1p c 78 30 90 18 86 34;2l k 2 56 40 84 56;2p a 84 56 96 58 88 64",
    "pram": "l k 3 26 82 66 54;l k 3 72 82 34 54;i a 180 290 12 8 84 88;p b 12 48 86 48 76 68 26 68;p d 12 "
        "48 86 48 84 54 14 54;l h 4 86 48 96 28 100 28;e k 16 72 38 94;e w 22 78 32 88;e k 60 72 82 94;e w "
        "66 78 76 88;1e c 40 54 50 64",
    "bottle": "r w 32 34 68 96 10;r s 35 56 65 93 8;r a 29 26 71 38 3;p s 38 26 45 14 55 14 62 26;e s 44 6 "
        "56 20;r h 54 48 65 49.5;r h 58 58 65 59.5;r h 54 68 65 69.5;r h 58 78 65 79.5;1e b 38 62 52 76",
    "sofa": "r n 12 80 18 90;r n 82 80 88 90;r d 10 26 90 66 8;r a 4 42 21 82 6;r a 79 42 96 82 6;r a 21 30 "
        "50 60 4;r a 50 30 79 60 4;r t 20 58 50 72 4;r t 50 58 80 72 4;r a 16 71 84 82 2;1r b 24 40 42 58 3;"
        "2r c 60 40 77 58 3",
    "table": "r n 14 46 20 92;r n 80 46 86 92;r n 28 46 32 80;r n 68 46 72 80;p n 18 30 82 30 96 44 4 44;r n "
        "4 44 96 49;1r a 40 16 60 34 2;2e w 22 33 42 40;2r b 66 24 74 36 2",
    "linen": "r a 12 70 88 92 9;r b 12 50 88 72 9;r c 12 30 88 52 9;r t 12 12 88 32 9;r d 12 79 84 81;r w 12 "
        "60 84 62;r w 12 40 84 42;1r w 40 8 52 94;2r a 12 21 84 23",
    "pillow": "p d 8 14 50 21 92 14 87 52 92 90 50 84 8 90 13 52;p a 12 18 50 24 88 18 84 50 88 84 50 79 12 "
        "84 16 50;1e t 34 34 66 68;2p b 50 30 68 51 50 72 32 51",
    "frame": "r n 8 8 92 92;r w 15 15 85 85;r t 22 22 78 78;p a 22 78 42 42 60 78;p d 46 78 64 50 78 72 78 "
        "78;1e c 56 28 70 42;2e b 28 30 40 42",
    "vase": "l y 2 50 40 34 12;l y 2 50 40 50 8;l y 2 50 40 66 14;e b 26 4 42 20;e c 42 0 58 16;e b 58 6 74 "
        "22;e w 31 9 37 15;e w 47 5 53 11;e w 63 11 69 17;p a 40 36 60 36 56 46 74 64 66 94 34 94 26 64 44 "
        "46;r t 29 62 71 68",
    "parasol": "l h 3 50 16 50 92;r k 34 90 66 97 2;i a 180 360 3 10 97 86;i b 216 252 3 10 97 86;i b 288 "
        "324 3 10 97 86;e c 47 6 53 12;1r n 62 74 92 78;1r n 66 78 69 94;1r n 85 78 88 94",
    "lounger": "l n 4 4 70 70 70;l n 4 66 70 92 34;l n 3 12 70 12 88;l n 3 62 70 62 88;l n 3 84 48 84 88;p a "
        "4 62 62 62 90 26 96 31 66 70 4 70;p b 78 36 90 22 97 28 85 44;1r c 8 58 30 63",
    "pool": "e h 3 24 97 90;e w 3 20 97 80;e u 8 24 92 75;a w 1.5 200 320 22 38 48 54;a w 1.5 200 320 52 46 "
        "80 64;l h 3 70 92 70 18 78 14;l h 3 84 88 84 14 78 14;l h 2 70 40 84 40;l h 2 70 58 84 58;1e c 22 "
        "44 40 58;1e u 27 48 35 54;2r a 3 76 6 80",
    "rake": "l n 4 50 2 50 74;r a 18 72 82 78 2;l k 3 21 78 21 96;l k 3 33 78 33 96;l k 3 44 78 44 96;l k 3 "
        "56 78 56 96;l k 3 67 78 67 96;l k 3 79 78 79 96;1r b 47 4 53 24 2",
    "shears": "p h 46 52 52 48 66 6 72 4 62 46 56 56;p h 54 52 48 48 34 6 28 4 38 46 44 56;l a 8 48 54 32 92;"
        "l a 8 52 54 68 92;e k 45 45 55 55;1l b 3 36 76 64 76",
    "bone": "l s 18 26 50 74 50;e s 8 28 34 52;e s 8 48 34 72;e s 66 28 92 52;e s 66 48 92 72;1r a 44 38 56 "
        "62",
    "bowl": "p a 12 46 88 46 98 84 2 84;e d 12 34 88 58;e n 18 38 82 55;e s 26 40 36 46;e s 44 42 54 48;e s "
        "60 40 70 46;e s 36 46 46 52;e s 54 47 64 53;l w 7 40 70 60 70;e w 34 62 42 70;e w 34 69 42 77;e w "
        "58 62 66 70;e w 58 69 66 77",
    "jar": "r t 24 22 76 94 10;r a 27 40 73 91 8;r b 26 8 74 24 3;r w 32 50 68 78 2;e c 42 54 58 70;r k 38 "
        "72 62 74;1r h 28 14 72 16",
    "packet": "p a 24 14 76 14 82 94 18 94;r d 22 8 78 18;p h 22 8 26 4 30 8 34 4 38 8 42 4 46 8 50 4 54 8 "
        "58 4 62 8 66 4 70 8 74 4 78 8;e w 30 34 70 66;e b 36 42 50 58;e c 48 42 62 58;r w 32 74 68 79;r w "
        "38 83 62 86",
    "parcel": "p n 10 34 54 44 54 94 10 78;p s 54 44 90 32 90 76 54 94;p n 10 34 46 22 90 32 54 44;p w 28 28 "
        "36 26 76 36 70 39;1r w 20 56 38 66",
}
# Class -> its objects; the first is drawn in about two thirds of its own pictures, the rest share the others.
CLASS_OBJECTS = {
    10: ("book",), 2705: ("book",), 2280: ("magazine",), 2403: ("stack", "book", "magazine"),
    2522: ("notebook", "pens"), 1280: ("robot", "teddy"), 1140: ("figurine", "teddy", "tshirt"),
    1281: ("board", "dice", "cards"), 1180: ("figurine", "dice"), 1160: ("cards",), 1300: ("drone", "car"),
    1302: ("slide", "ball"), 1301: ("tshirt", "dartboard"), 1320: ("pram", "bottle"),
    40: ("game_case", "console"), 60: ("console", "gamepad"), 2462: ("game_case", "console", "gamepad"),
    50: ("gamepad", "headset"), 2905: ("screen", "game_case"), 2582: ("parasol", "lounger", "table"),
    2583: ("pool", "lounger"), 2585: ("rake", "shears"), 1560: ("sofa", "table"), 1920: ("linen", "pillow"),
    2060: ("frame", "vase", "pillow"), 2220: ("bone", "bowl"), 1940: ("jar", "packet"),
}
FIXED_COLOURS = {"k": (44, 44, 50), "h": (150, 152, 158), "w": (246, 245, 240), "n": (160, 116, 72),
                 "s": (232, 196, 160), "u": (70, 170, 214), "y": (84, 140, 70)}
USED = (10, 2280, 2403, 2462)  # photographed at home more often
HOME_BACKGROUND = {"plain": 0.25, "gradient": 0.15, "room": 0.60, "lawn": 0.0}
LAWN_BACKGROUND = {"plain": 0.40, "gradient": 0.10, "room": 0.05, "lawn": 0.45}
SHOP_BACKGROUND = {"plain": 0.60, "gradient": 0.25, "room": 0.12, "lawn": 0.03}


# --- Text -------------------------------------------------------------------------------------------------
@dataclass
class Product:
    """One row of the tables; `description` is "" where missing, `described` says whether it should be."""
    index: int
    code: int
    described: bool
    title: str = ""
    description: str = ""
    productid: int = 0
    imageid: int = 0


def generator(seed: int, index: int, stream: int, attempt: int = 0) -> np.random.Generator:
    """The generator of one product for its text or its picture, or of the tables (index 0)."""
    return np.random.default_rng([seed, index, stream, attempt])


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def expand(template: str, rng: np.random.Generator) -> str:
    """The template with every {name} replaced by a number or a word, recursively."""
    def fill(match: re.Match) -> str:
        name = match[1]
        if name in NUMBERS:
            low, high = NUMBERS[name]
            return str(rng.integers(low, high + 1))
        return expand(pick(rng, WORDS[name].split("|")), rng)
    return re.sub(r"\{(\w+)\}", fill, template)


def draw_length(rng: np.random.Generator, median: float, spread: float, longest: int) -> int:
    """A number of words, log-normal, from 2 to `longest`."""
    return int(np.clip(round(rng.lognormal(np.log(median), spread)), 2, longest))


def group_of(code: int) -> str:
    """The name of the neighbourhood of a class."""
    return NEIGHBOURHOOD[code]


def draw_language(rng: np.random.Generator) -> str:
    """"fr", "en" or "de"."""
    if rng.random() >= P_FOREIGN:
        return "fr"
    return "de" if rng.random() < P_GERMAN else "en"


def foreign_templates(code: int, language: str) -> list[list[str]]:
    """Titles, additions and sentences in English or German, with the noun of the class in place."""
    noun = FOREIGN_NOUNS[code][("en", "de").index(language)]
    return [text.replace("@", noun).split("|") for text in FOREIGN[language]]


def make_title(code: int, language: str, rng: np.random.Generator) -> str:
    """A title: one template, then additions until a drawn length is reached."""
    _, vague, extras, _ = GROUPS[group_of(code)]
    titles = (vague if rng.random() < P_VAGUE_TITLE else CLASSES[code][0]).split("|")
    extras = extras.split("|")
    if language != "fr":
        titles, extras, _ = foreign_templates(code, language)
    target = draw_length(rng, TITLE_MEDIAN, TITLE_SPREAD, TITLE_MAX)
    title, separator = expand(pick(rng, titles), rng), pick(rng, (" - ", ", ", " ", " / "))
    while len(title.split()) < target:
        title += separator + expand(pick(rng, extras), rng)
    title = " ".join(title.split()[:TITLE_MAX])
    if rng.random() < P_CAPITALS:
        title = title.upper()
    return encode(title, rng) if rng.random() < P_TITLE_ENTITIES else title


def sentence_pools(code: int, language: str, rng: np.random.Generator) -> list[list[str]]:
    """The lists of sentences a description draws from, the most telling first."""
    own, neighbours = CLASSES[code][1].split("|"), GROUPS[group_of(code)][3].split("|")
    if language != "fr":
        return [foreign_templates(code, language)[2]]
    draw = rng.random()
    if draw < P_BOILERPLATE:
        return [BOILERPLATE]
    if draw < P_BOILERPLATE + P_VAGUE_DESCRIPTION:
        return [neighbours, neighbours, BOILERPLATE]
    return [own, own, neighbours, BOILERPLATE]


def make_description(code: int, language: str, rng: np.random.Generator) -> str:
    """A description with its markup, of a drawn length of at most MAX_WORDS words."""
    pools = sentence_pools(code, language, rng)
    target = draw_length(rng, TEXT_MEDIAN, TEXT_SPREAD, MAX_WORDS - 30)  # room for the last sentence and tags
    sentences = [expand(pick(rng, pools[0]), rng)]
    words, used = len(sentences[0].split()), set()
    while words < target:
        pool = pick(rng, pools)
        template = pick(rng, [template for template in pool if template not in used] or pool)
        used.add(template)
        sentence = expand(template, rng)
        if sentence not in sentences:
            sentences.append(sentence)
        words += len(sentence.split())  # counted either way, so that a small pool ends too
    if rng.random() < P_CAPITALS:
        sentences[0] = sentences[0].upper()
    return mark_up(sentences, rng)


def encode(text: str, rng: np.random.Generator) -> str:
    """The text with its accents as named entities; mostly, apostrophes and spaces before ":" and "!" too."""
    text = re.sub(r"&(?!\w+;)", "&amp;", text)
    text = re.sub(r"[^\x00-\x7f]", lambda letter: f"&{html.entities.codepoint2name[ord(letter[0])]};", text)
    if rng.random() < 0.7:
        text = text.replace("'", "&#39;").replace(" :", "&nbsp;:").replace(" !", "&nbsp;!")
    return text


def mark_up(sentences: list[str], rng: np.random.Generator) -> str:
    """The sentences as one text: entities, then HTML tags, each for a share of the descriptions."""
    if rng.random() < P_ENTITIES:
        sentences = [encode(sentence, rng) for sentence in sentences]
    else:
        sentences = [sentence.replace(" & ", " &amp; ") for sentence in sentences]
    if rng.random() >= P_HTML:
        return " ".join(sentences)
    first, *rest = sentences
    layout = rng.integers(4)
    if layout == 0:
        return "<br />".join(sentences)
    if layout == 1:
        return "".join(f"<p>{sentence}</p>" for sentence in sentences)
    if layout == 2:
        return f"<div><b>{first}</b><br />{' '.join(rest)}</div>"
    return f"<b>{first}</b> <ul>{''.join(f'<li>{sentence}</li>' for sentence in rest)}</ul>"


# --- Tables -----------------------------------------------------------------------------------------------
def load_classes() -> dict[int, tuple[int, int]]:
    """Class -> (training rows, rows with a description) of the real data, from the CSV beside this file."""
    with open(Path(__file__).with_name("rakuten_classes.csv"), encoding="utf-8", newline="") as file:
        return {int(row["prdtypecode"]): (int(row["train_rows"]), int(row["rows_with_description"]))
                for row in csv.DictReader(file)}


def class_counts(rows: int, minimum: int) -> dict[int, int]:
    """Rows per class: proportional to the real ones, `rows` in all, none below `minimum`."""
    real = {code: train for code, (train, _) in load_classes().items()}
    if rows < minimum * len(real):
        raise ValueError(f"rows={rows} is too few: {len(real)} classes need {minimum} each, "
                         f"so ask for at least {minimum * len(real)}.")
    counts: dict[int, int] = {}
    while True:  # a class raised to the minimum leaves less for the others, which may push one more below it
        free = {code: train for code, train in real.items() if code not in counts}
        scale = (rows - sum(counts.values())) / sum(free.values())
        small = [code for code, train in free.items() if train * scale < minimum]
        if not small:
            break
        counts |= dict.fromkeys(small, minimum)
    whole = {code: int(train * scale) for code, train in free.items()}
    by_remainder = sorted(free, key=lambda code: whole[code] - free[code] * scale)
    for code in by_remainder[:rows - sum(counts.values()) - sum(whole.values())]:
        whole[code] += 1
    return counts | whole


def plan_rows(rows: int, min_rows: int, min_described: int, first: int,
              rng: np.random.Generator) -> list[Product]:
    """The products, shuffled, with class and whether described, numbered from `first`, still without text."""
    planned = []
    for code, count in class_counts(rows, min_rows).items():
        train, with_text = load_classes()[code]
        described = min(count, max(min_described, round(count * with_text / train)))
        planned += [(code, position < described) for position in range(count)]
    order = rng.permutation(len(planned))
    return [Product(first + row, *planned[position]) for row, position in enumerate(order)]


def add_texts(products: list[Product], seed: int) -> None:
    """Give every product its title and description; a text that is already taken is drawn again."""
    taken: set[str] = set()
    for product in products:
        attempt = 0
        while not product.title:
            rng = generator(seed, product.index, TEXT, attempt)
            language = draw_language(rng)
            title = make_title(product.code, language, rng)
            description = make_description(product.code, language, rng) if product.described else ""
            if not {title, description} & taken:
                product.title, product.description = title, description
                taken |= {title, description} - {""}
            attempt += 1


def copy_texts(products: list[Product], field: str, share: float, rng: np.random.Generator) -> None:
    """Overwrite a share of the titles or descriptions by another product's, mostly one of the same class."""
    having = [product for product in products if getattr(product, field)]
    order = rng.permutation(len(having))
    cut = round(share * len(having))
    sources = [having[position] for position in order[cut:]]
    for position in order[:cut]:
        copy = having[position]
        same = [source for source in sources if source.code == copy.code]
        near = [source for source in sources if group_of(source.code) == group_of(copy.code)]
        chosen = same if same and rng.random() < P_SAME_CLASS_COPY else near
        setattr(copy, field, getattr(pick(rng, chosen), field))


def add_numbers(products: list[Product], rng: np.random.Generator) -> None:
    """Give every product its productid and imageid: unique, 7 to 10 digits, unrelated to the class."""
    digits = rng.integers(7, 11, 6 * len(products))
    numbers = np.unique(rng.integers(10 ** (digits - 1), 10 ** digits))
    numbers = rng.permutation(numbers)[:2 * len(products)].tolist()
    for product, productid, imageid in zip(products, numbers[::2], numbers[1::2], strict=True):
        product.productid, product.imageid = productid, imageid


def make_products(rows: int, test_rows: int, seed: int) -> tuple[list[Product], list[Product]]:
    """The labelled products and the unlabelled ones, whose index goes on after the labelled."""
    rng = generator(seed, 0, TABLE)
    train = plan_rows(rows, MIN_ROWS, MIN_DESCRIBED, 0, rng)
    test = plan_rows(test_rows, 0, 0, rows, rng)
    add_texts(train + test, seed)
    copy_texts(train, "title", TITLE_COPIES, rng)
    copy_texts(train, "description", DESCRIPTION_COPIES, rng)
    add_numbers(train + test, rng)
    return train, test


# --- Pictures ---------------------------------------------------------------------------------------------
def colour(rng: np.random.Generator, saturation: tuple = (0.35, 0.9), value: tuple = (0.45, 0.95)) -> tuple:
    """A random (red, green, blue), 0 to 255."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return tuple(int(255 * part) for part in rgb)


def scaled(rgb: tuple, factor: float) -> tuple:
    """The colour made darker (factor below 1) or lighter."""
    return tuple(int(min(255, part * factor + (40 if factor > 1 else 0))) for part in rgb)


def palette(rng: np.random.Generator) -> dict[str, tuple]:
    """The colours of one object: the fixed ones, three random ones, and two shades of the first."""
    main = colour(rng)
    shades = {"d": scaled(main, 0.65), "t": scaled(main, 1.2)}
    return FIXED_COLOURS | shades | {"a": main, "b": colour(rng), "c": colour(rng)}


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, colours: dict, unit: float) -> None:
    """Draw one shape of the language described above OBJECTS; `unit` is pixels per unit."""
    kind, letter, *rest = shape.split()
    values, fill, outline = [float(word) for word in rest], colours[letter], scaled(colours[letter], 0.72)
    options = 2 if kind in "ia" else 1 if kind in "lg" else 0
    options += kind == "a"
    box = [unit * value for value in values[options:]]
    thin = max(1, round(unit * 0.5))
    if kind == "r":
        radius = box.pop() if len(box) == 5 else 0
        draw.rounded_rectangle(box, radius, fill, outline, thin)
    elif kind == "e":
        draw.ellipse(box, fill, outline, thin)
    elif kind == "p":
        draw.polygon(box, fill, outline, thin)
    elif kind == "l":
        draw.line(box, fill, round(unit * values[0]), joint="curve")
    elif kind == "i":
        draw.pieslice(box, values[0], values[1], fill, outline, thin)
    elif kind == "a":
        draw.arc(box, values[1], values[2], fill, round(unit * values[0]))
    else:
        draw_checkerboard(draw, box, int(values[0]), fill)


def draw_checkerboard(draw: ImageDraw.ImageDraw, box: list[float], count: int, fill: tuple) -> None:
    """Draw `count` x `count` squares, coloured and white in turn."""
    left, top, right, bottom = box
    side, height = (right - left) / count, (bottom - top) / count
    for row in range(count):
        for column in range(count):
            corner = (left + column * side, top + row * height)
            shade = fill if (row + column) % 2 else FIXED_COLOURS["w"]
            draw.rectangle((*corner, corner[0] + side, corner[1] + height), shade)


def draw_object(name: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The object on a transparent layer: drawn large and reduced to `size`, lit from one side, rotated."""
    side = 560
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw, colours, optional = ImageDraw.Draw(layer), palette(rng), rng.random(2) < 0.5
    for shape in OBJECTS[name].split(";"):
        if shape[0] in "12" and not optional[int(shape[0]) - 1]:
            continue
        draw_shape(draw, shape.lstrip("12"), colours, side / 100)
    layer = layer.resize(size, Image.Resampling.BOX)
    row = np.linspace(*rng.permutation([185, 255]), size[0]).astype(np.uint8)[None]
    light = Image.fromarray(row).resize(size, Image.Resampling.NEAREST)
    layer = ImageChops.multiply(layer, Image.merge("RGBA", (light, light, light, Image.new("L", size, 255))))
    return layer.rotate(rng.normal(0, 9), Image.Resampling.BILINEAR, expand=True)


def draw_background(size: tuple[int, int], shares: dict[str, float], rng: np.random.Generator) -> Image.Image:
    """A photograph without its object: plain, gradient, room (wall and floor boards) or lawn."""
    width, height = size
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    wall = colour(rng, (0.05, 0.3), (0.6, 0.92)) if kind == "room" else colour(rng, (0.0, 0.12), (0.88, 1.0))
    photo = np.full((height, width, 3), wall, np.uint8)
    horizon = int(height * rng.uniform(0.5, 0.72))
    if kind == "gradient":
        photo[:] = np.linspace(wall, 0.3 * np.array(wall) + 0.7 * np.array(colour(rng)), height)[:, None]
    elif kind == "lawn":
        photo[:horizon] = np.array([188, 216, 236]) * rng.uniform(0.85, 1.05)
        grass = np.array([112, 158, 78]) * rng.uniform(0.75, 1.1)
        blades = grass + rng.uniform(-18, 18, (height - horizon, width // 4 + 1, 1))
        photo[horizon:] = blades.repeat(4, axis=1)[:, :width]
    elif kind == "room":
        floor = np.array(colour(rng, (0.25, 0.55), (0.35, 0.75)))
        photo[horizon:] = floor * (1 + 0.05 * np.sin(np.arange(width) / rng.uniform(5, 14)))[:, None]
        photo[horizon:horizon + 6] = floor * 0.6
    return Image.fromarray(photo)


def choose_object(code: int, rng: np.random.Generator) -> str:
    """What the picture shows: an object of the class, of a neighbour, or a parcel."""
    draw = rng.random()
    if draw < P_PARCEL:
        return "parcel"
    if draw < P_PARCEL + P_NEIGHBOUR_PICTURE:
        code = pick(rng, [other for other in GROUPS[group_of(code)][0] if other != code])
    first, *others = CLASS_OBJECTS[code]
    return first if not others or rng.random() < 2 / 3 else pick(rng, others)


def choose_background(code: int) -> dict[str, float]:
    """The shares of backgrounds for a class."""
    if code in USED:
        return HOME_BACKGROUND
    return LAWN_BACKGROUND if code in GROUPS["garden"][0] else SHOP_BACKGROUND


def draw_picture(code: int, seed: int, index: int) -> Image.Image:
    """The picture of a product: 500 x 500 RGB, a photograph between two white or black borders."""
    rng = generator(seed, index, PICTURE)
    name = choose_object(code, rng)
    short = int(500 * rng.uniform(0.68, 0.92))
    size = (500, short) if rng.random() < 0.5 else (short, 500)
    photo = draw_background(size, choose_background(code), rng)
    side = short * rng.uniform(0.55, 0.88)
    layer = draw_object(name, (int(side * rng.uniform(0.85, 1.1)), int(side)), rng)
    left, top = ((whole - part) * rng.uniform(0.25, 0.75) for whole, part in zip(size, layer.size))
    place = int(left), int(top)
    shade = Image.new("L", (size[0] // 4, size[1] // 4))
    mask = layer.getchannel("A").reduce(4).point(lambda alpha: alpha * 0.4)
    shade.paste(mask, (place[0] // 4 + 2, place[1] // 4 + 3))
    shade = shade.filter(ImageFilter.GaussianBlur(2)).resize(size, Image.Resampling.BILINEAR)
    photo.paste((30, 30, 35), (0, 0), shade)
    photo.paste(layer, place, layer)
    noise = Image.fromarray(rng.integers(0, 7, size[::-1], dtype=np.uint8)).convert("RGB")
    photo = ImageChops.add(photo, noise, offset=-3)
    border = (0, 0, 0) if rng.random() < P_BLACK_BORDER else (255, 255, 255)
    picture = Image.new("RGB", (500, 500), border)
    picture.paste(photo, ((500 - size[0]) // 2, (500 - size[1]) // 2))
    return picture


# --- Files ------------------------------------------------------------------------------------------------
def draw_files(tasks: Iterable[tuple[str, int, int, int]]) -> None:
    """Draw and save one JPEG per task (file, class, seed, index)."""
    for file, code, seed, index in tasks:
        draw_picture(code, seed, index).save(file, quality=80)


def draw_in_processes(tasks: Sequence[tuple[str, int, int, int]], workers: int) -> None:
    """Draw the tasks in `workers` processes that run this file: needs no importable module and no fork."""
    command = [sys.executable, str(Path(__file__).resolve()), "--draw-from-stdin"]
    processes = []
    try:
        for worker in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            processes.append(process)
            process.stdin.write(json.dumps(tasks[worker::workers]))
            process.stdin.close()
        for process in processes:
            message = process.stderr.read()
            if process.wait():
                raise RuntimeError(f"Drawing the sample's pictures failed:\n{message}")
    finally:
        for process in processes:
            process.kill()
            process.stderr.close()
            process.wait()


def write_table(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """Write a CSV with "\\n" line ends; an empty text stays an empty field, as in the real files."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(folder: Path, train: list[Product], test: list[Product]) -> None:
    """Write the three tables of the ENS layout."""
    header = ["", "designation", "description", "productid", "imageid"]
    for name, products in (("X_train_update.csv", train), ("X_test_update.csv", test)):
        rows = ([p.index, p.title, p.description, p.productid, p.imageid] for p in products)
        write_table(folder / name, header, rows)
    write_table(folder / "Y_train_CVw08PX.csv", ["", "prdtypecode"], ([p.index, p.code] for p in train))


def write_pictures(folder: Path, train: list[Product], test: list[Product], seed: int, workers: int) -> None:
    """Write images/image_train/ and images/image_test/."""
    tasks = []
    for name, products in (("image_train", train), ("image_test", test)):
        images = folder / "images" / name
        images.mkdir(parents=True)
        for p in products:
            file = images / f"image_{p.imageid}_product_{p.productid}.jpg"
            tasks.append((str(file), p.code, seed, p.index))
    if workers > 1:
        draw_in_processes(tasks, workers)
    else:
        draw_files(tasks)


def describe_sample(rows: int, test_rows: int, seed: int) -> dict:
    """The content of sample.json: a caller compares it to tell whether a written sample is current."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"rows": rows, "test_rows": test_rows, "seed": seed, "version": VERSION, "source_sha256": source}


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder in the place of the old one, which is removed."""
    old = new.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_catalogue(folder: Path, rows: int = 1800, test_rows: int = 120, seed: int = 0,
                    workers: int = 2) -> None:
    """Write the sample: tables, pictures, sample.json. The folder appears whole or stays as it was.

    Raises ValueError if `rows` is too few for 27 classes, or if the folder holds something else.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "sample.json").exists():
        raise ValueError(f"{folder} holds files that are not a generated sample: "
                         "name another folder, or empty it.")
    print(f"Writing a synthetic sample of {rows} + {test_rows} products to {folder.name}/ ...")
    train, test = make_products(rows, test_rows, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}.partial")
    try:
        partial.mkdir()
        write_tables(partial, train, test)
        write_pictures(partial, train, test, seed, workers)
        facts = json.dumps(describe_sample(rows, test_rows, seed), indent=1)
        (partial / "sample.json").write_text(facts + "\n", encoding="utf-8")
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Wrote {sum(1 for p in train if p.description)} descriptions and {rows + test_rows} pictures.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a synthetic sample in the ENS layout.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("sample"))
    parser.add_argument("--rows", type=int, default=1800)
    parser.add_argument("--test-rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draw-from-stdin", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options.pop("draw_from_stdin"):
        draw_files(json.load(sys.stdin))
    else:
        write_catalogue(**options)


if __name__ == "__main__":
    main()
